"""The floors of the architecture: imports point down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {
    "encode",
    "teacher_cache",
    "distill",
    "finetune",
    "download",
    "sample",
    "evaluate",
    "export",
    "verify",
    "inspect_shards",
}
PURE = {"diffusion", "losses", "taps", "students", "single_file"}
IO_MODULES = {"os", "pathlib", "io", "json", "shutil", "click", "diffusers", "transformers", "accelerate"}


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, `from a import b` as `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def ours(path: Path) -> set[str]:
    """Names of the pipeline's modules that a file imports."""
    parts = [name.split(".") for name in imports(path)]
    return {p[1] for p in parts if p[0] == "pipeline" and len(p) > 1}


def test_there_are_modules_to_check():
    assert len(modules("shards")) > 5
    assert {path.stem for path in modules("pipeline")} >= STAGES | PURE | {"cli", "models"}


@pytest.mark.parametrize("path", modules("shards"), ids=lambda p: p.stem)
def test_shards_never_imports_pipeline(path):
    assert not {name for name in imports(path) if name.split(".")[0] == "pipeline"}


@pytest.mark.parametrize("path", modules("pipeline"), ids=lambda p: p.stem)
def test_only_the_top_imports_a_stage(path):
    above = ours(path) & (STAGES | {"cli"})
    assert not above, f"{path.name} imports {above}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_do_no_io(name):
    path = ROOT / "pipeline" / f"{name}.py"
    assert not {i.split(".")[0] for i in imports(path)} & IO_MODULES
    assert ours(path) <= PURE


def test_imports_of_the_pipeline_form_no_circle():
    graph = {path.stem: ours(path) for path in (ROOT / "pipeline").glob("*.py")}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name in graph if name not in done and graph[name] & graph.keys() <= done}
        assert free, f"a circle among {sorted(graph.keys() - done)}"
        done |= free
