"""What the README tells a newcomer to type works: each command and snippet is run, on small models."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pytest
from support.web import IMG2DATASET, serving, write_list

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    ((?:make|distill-sd) .*)$", README, re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALL = {
    "--resolution 512": "--resolution 32",
    "--max-train-steps 15000": "--max-train-steps 2",
    "--max-train-steps 2000": "--max-train-steps 2",
    "STEPS=15000": "STEPS=2",
}


@pytest.fixture(scope="module")
def desk(teacher, images, tmp_path_factory):
    """A directory in which the README's names stand for something."""
    place = tmp_path_factory.mktemp("desk")
    (place / "path" / "to").mkdir(parents=True)
    for name in ("checkpoint", "path/to/checkpoint"):
        (place / name).symlink_to(teacher)
    for name in ("pictures", "path/to/pictures"):
        (place / name).symlink_to(images)
    own_data(images, place)
    with serving() as server:
        write_list(place / "list.parquet", [(f"{server}/good/{number}.jpg", "a caption") for number in range(3)])
        yield place


def own_data(images, place):
    """The same pictures as a folder with texts, tars, a table and a saved dataset, under the README's names."""
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    (place / "captioned").mkdir()
    (place / "tars").mkdir()
    for row in rows:
        shutil.copy(images / row["file_name"], place / "captioned")
        (place / "captioned" / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    with tarfile.open(place / "tars" / "00000.tar", "w") as tar:
        for path in sorted((place / "captioned").iterdir()):
            tar.add(path, path.name)
    columns = {
        "image": [(images / row["file_name"]).read_bytes() for row in rows],
        "text": [row["text"] for row in rows],
    }
    dataset = datasets.Dataset.from_dict(columns)
    dataset.rename_column("text", "title").to_parquet(place / "photos.parquet")
    datasets.DatasetDict(validation=dataset).save_to_disk(place / "dataset")


def shell(command: str, cwd: Path) -> None:
    for large, small in SMALL.items():
        command = command.replace(large, small)
    programs = [Path(sys.executable).parent, *([Path(IMG2DATASET).parent] if IMG2DATASET else [])]
    path = ":".join([*map(str, programs), os.environ["PATH"]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "HF_DATASETS_CACHE": str(cwd / "library")}
    result = subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stderr}"


def test_the_stages_run_as_written(desk):
    stages = [command for command in COMMANDS if command.startswith("distill-sd")]
    assert [stage.split()[1] for stage in stages] == [
        "encode",
        "encode",
        "encode",
        "encode",
        "download",
        "encode",
        "teacher-cache",
        "distill",
        "finetune",
        "sample",
        "evaluate",
        "export",
        "plan",
        "inspect",
        "verify",
        "verify",
        "verify",
    ]
    for stage in stages:
        if not stage.startswith("distill-sd download") or IMG2DATASET:
            shell(stage, desk)
    assert (desk / "student" / "model_index.json").is_file()
    assert not IMG2DATASET or (desk / "downloaded" / "00000.tar").is_file()


# The environment of this test: the one that `make` would make is not made a second time.
HERE = f"-f {ROOT}/Makefile VENV={sys.prefix} -o {sys.prefix}/.ready"


def test_make_distill_alone_runs_the_demo(desk):
    assert "make distill" in COMMANDS
    shell(f"make distill {HERE} SCENES=12 ROUNDS=1 SAMPLES=2 STEPS=2 BATCH=2", desk)
    assert (desk / "work" / "demo" / "sd_small" / "report.html").is_file()


def test_make_distill_runs_the_whole_road(desk):
    (command,) = [command for command in COMMANDS if command.startswith("make distill TEACHER")]
    shell(f"{command} {HERE} RESOLUTION=32", desk)
    assert (desk / "work" / "sd_small" / "model_index.json").is_file()


def test_the_snippets_run(desk, monkeypatch):
    """After the stages above; pictures are kept small."""
    from diffusers import StableDiffusionPipeline

    monkeypatch.chdir(desk)
    real = StableDiffusionPipeline.__call__
    monkeypatch.setattr(
        StableDiffusionPipeline, "__call__", lambda self, *a, **k: real(self, *a, **{**k, "num_inference_steps": 2})
    )
    assert len(SNIPPETS) == 3
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), {})
    assert (desk / "image.png").is_file()
    assert (desk / "scene.png").is_file()


def test_every_make_target_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = {command.split()[1] for command in COMMANDS if command.startswith("make")}
    assert named >= {"encode", "teacher-cache", "distill", "test", "help"} - {"help"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_extra_that_is_named_exists():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "pipeline").rglob("*.py")]
    named = set(re.findall(r"(?:distill-sd|'\.)\[([a-z0-9]+)\]", "\n".join([README, *sources])))
    assert named >= {"datasets", "evaluate", "int8", "lora", "onnx"}
    _, extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")
    assert named <= set(re.findall(r"^([a-z0-9]+) = ", extras.split("\n[")[0], re.MULTILINE))


def test_files_that_are_linked_exist():
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
