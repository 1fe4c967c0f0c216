"""What `pip install` of the wheel gives: the commands and their data, without make and without this folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pipeline", "shards", "tests")
# Pages for readers of the repository.
PAGES = ("pipeline/README.md", "pipeline/docs/*", "pipeline/docs/*/*", "shards/README.md")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

# Run where the wheel is installed, and nothing else of this project: prints where the package lies, and uses its data.
INSIDE = """
import pipeline, shards
from pipeline.models.bundled import teacher_folder
from pipeline.system.extras import install_command
print(pipeline.__file__, shards.__file__, teacher_folder(), install_command("lora"), sep="\\n")
"""


def run(*command, **options):
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this folder: setuptools leaves its intermediate files next to the sources."""
    work = tmp_path_factory.mktemp("wheel")
    copy = work / "copy"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", work, copy)
    (file,) = work.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed wheel. The packages that it needs are those of the tests."""
    target = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", "--no-index", "--no-deps", "--target", target, wheel)
    return target


@pytest.fixture
def outside(installed, tmp_path):
    """How a program is run in an empty folder with the installed wheel."""
    return {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(installed)}}


def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel):
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("pipeline", "shards")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path not in pages and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources
    assert {Path(name).suffix for name in names} >= {".py", ".yaml", ".json", ".safetensors", ".gz"}


def test_the_commands_run_without_the_sources(installed, outside):
    assert "Usage: python -m pipeline.encode " in run(sys.executable, "-m", "pipeline.encode", "--help", **outside)
    assert "teacher-cache" in run(installed / "bin" / "distill-sd", "--help", **outside)
    # A preset is data, and --check reads it.
    cache = ["teacher-cache", "--preset", "bk-sdm-2m", "--teacher", "demo", "--latents", "l", "--out", "o", "--check"]
    run(installed / "bin" / "distill-sd", *cache, **outside)


def test_the_bundled_teacher_is_intact_and_the_extras_are_known(installed, outside):
    package, shards, teacher, command = run(sys.executable, "-c", INSIDE, **outside).splitlines()
    assert all(Path(path).is_relative_to(installed) for path in (package, shards, teacher))
    assert command.startswith("pip install 'peft")
