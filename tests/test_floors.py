"""The floors of the architecture: imports point down only, wherever in a file they stand."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up. A package imports from lower floors and from itself; a module of the topmost two not even that.
FLOORS = (
    {"core", "system"},
    {"models"},
    {"settings"},
    {"data"},
    {"cache", "sampling", "export"},
    {"training", "evaluation", "demo"},
    {"commands"},
    {"encode", "teacher_cache", "distill", "cli"},
)
RANKS = {name: rank for rank, floor in enumerate(FLOORS) for name in floor}
TOP = FLOORS[-2] | FLOORS[-1]
IO_MODULES = {"os", "pathlib", "io", "json", "shutil", "click", "diffusers", "transformers", "accelerate"}
MODULES = sorted((ROOT / "pipeline").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports anywhere, `from a import b` as `a.b`."""
    return imports_of(path.read_text(encoding="utf-8"))


def imports_of(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def home(path: Path) -> str:
    """The package or top-level module of a file: `pipeline/data/tars.py` -> `data`."""
    return path.relative_to(ROOT / "pipeline").with_suffix("").parts[0]


def above(package: str, names: set[str]) -> list[str]:
    """Those of the imported names that lie on the package's own floor or above, outside the package."""
    packages = [(name, name.split(".")[1]) for name in names if name.startswith("pipeline.")]
    return sorted(name for name, other in packages if other != package and RANKS[other] >= RANKS[package])


def test_every_module_has_a_floor():
    assert {home(path) for path in MODULES} - {"__init__"} == set(RANKS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    if home(path) != "__init__":
        assert above(home(path), imports(path)) == []


def test_an_import_inside_a_function_is_seen():
    source = "def late():\n    from pipeline.demo import oracle\n    import pipeline.cli\n"
    assert above("models", imports_of(source)) == ["pipeline.cli", "pipeline.demo.oracle"]


@pytest.mark.parametrize("path", [p for p in MODULES if home(p) in TOP], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_do_not_import_one_another(path):
    assert not [name for name in imports(path) if name.split(".")[:1] == ["pipeline"] and name.split(".")[1] in TOP]


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline" / "core").rglob("*.py")), ids=lambda path: path.stem)
def test_the_core_does_no_io(path):
    assert not {name.split(".")[0] for name in imports(path)} & IO_MODULES


@pytest.mark.parametrize("path", sorted((ROOT / "shards").rglob("*.py")), ids=lambda path: path.stem)
def test_shards_never_imports_pipeline(path):
    assert not {name for name in imports(path) if name.split(".")[0] == "pipeline"}


def test_no_module_hides_one_of_the_standard_library():
    """Or `python pipeline/commands/verify.py`, which puts that folder on the path, would import ours in its place."""
    assert not {path.stem for path in (ROOT / "pipeline" / "commands").glob("*.py")} & sys.stdlib_module_names


def test_imports_inside_the_packages_form_no_circle():
    files = [*MODULES, *sorted((ROOT / "shards").rglob("*.py"))]
    dotted = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph = {
        module: {name if name in dotted else name.rpartition(".")[0] for name in imports(path)} & dotted.keys()
        for module, path in dotted.items()
    }
    done: set[str] = set()
    while len(done) < len(graph):
        free = {module for module in graph if module not in done and graph[module] - {module} <= done}
        assert free, f"a circle among {sorted(graph.keys() - done)}"
        done |= free
