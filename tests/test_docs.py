"""What the pages tell people to type works: every command and snippet is run, on small models.

The tests run in order: a page's commands use what the pages before it have written, and its snippets what its
commands have.
"""

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import traceback
from importlib.util import find_spec
from pathlib import Path

import click
import datasets
import numpy as np
import pytest
from click.testing import CliRunner
from support.buckets import create, environment, fill
from support.stages import reset_accelerate, run_encode, run_teacher_cache
from support.tiny import write_images
from support.web import IMG2DATASET, serving, write_list
from test_floors import FLOORS

from pipeline.cli import main
from pipeline.data.source import OpenSource
from pipeline.settings.data import DataSettings
from shards.dataset import CacheDataset
from shards.store import open_store

pytestmark = pytest.mark.usefixtures("few_steps", "remembered_evaluations")

ROOT = Path(__file__).parent.parent
NAMES = (
    "data",
    "teachers",
    "stages",
    "recipes",
    "deployment",
    "disk",
    "trust",
    "scaling",
    "rolling",
    "stores",
    "api",
    "troubleshooting",
)
DOCS = [f"pipeline/docs/{name}.md" for name in NAMES]
FORMAT, CONTRIBUTING, ARCHITECTURE = "shards/README.md", ".github/CONTRIBUTING.md", "pipeline/README.md"
PAGES = ["README.md", *DOCS, FORMAT, CONTRIBUTING, ARCHITECTURE]
BENCHMARKS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "benchmarks").glob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in [*PAGES, *BENCHMARKS]}
# Options that belong to other programs.
FOREIGN_OPTIONS = {"--help", "--mixed_precision", "--multi_gpu", "--nproc-per-node", "--prediction"}
# trtexec's, of which three have capital letters from here on.
FOREIGN_OPTIONS |= {"--onnx", "--fp16", "--min", "--opt", "--max"}

SMALL = {
    "--resolution 512 --buckets": "--resolution 128 --buckets",
    "--resolution 512": "--resolution 32",
    "--resolution 1024": "--resolution 32",
    "--out s3://bucket/cache": "--samples 0 --out s3://bucket/cache",
    # The server of processes has the environment that it began with, which knows no bucket.
    "--cache s3:": "--dataloader-num-workers 0 --cache s3:",
    "--order rounds": "--order rounds --train-batch-size 2",
    "--window 2": "--window 2 --samples 0",
    "--max-train-steps 15000": "--max-train-steps 2",
    "--max-train-steps 2000": "--max-train-steps 2",
    "--trial": "--trial --resolution 32 --batch-size 2",
    "distill-sd evaluate": "distill-sd evaluate --repeats 1 --bins 2 --num-inference-steps 3",
    "distill-sd sample": "distill-sd sample --num-inference-steps 3",
    "STEPS=15000": "STEPS=2",
    "--preset bk-sdm-0.22m --cache": "--preset bk-sdm-0.22m --gradient-accumulation-steps 1 --cache",
    "resolution: 512": "resolution: 32",
    "resolution=512": "resolution=32",
    "max_train_steps=15000": "max_train_steps=2",
    "max_train_steps: 15000": "max_train_steps: 2",
}


def commands_of(page: str) -> list[str]:
    return re.findall(r"^    ((?:make|distill-sd|accelerate|torchrun) .*)$", TEXTS[page], re.MULTILINE)


def snippets_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL)


ALL_COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
MAKE = [command for command in ALL_COMMANDS if command.startswith("make ")]


def small(text: str) -> str:
    for large, replacement in SMALL.items():
        text = text.replace(large, replacement)
    return text


def files_of(page: str) -> dict[str, str]:
    """YAML files that a page shows, by the names in their first lines."""
    return dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", TEXTS[page], re.DOTALL))


@pytest.fixture(scope="module")
def desk(teacher, xl_teacher, tmp_path_factory):
    """A directory in which the names of the pages exist."""
    place = tmp_path_factory.mktemp("desk")
    images = write_images(place / "images", 5)
    (place / "path" / "to").mkdir(parents=True)
    for name in ("checkpoint", "path/to/checkpoint"):
        (place / name).symlink_to(teacher)
    (place / "sdxl").symlink_to(xl_teacher)
    (place / "path" / "to" / "images").symlink_to(images)
    for name, text in itertools.chain.from_iterable(files_of(page).items() for page in PAGES):
        (place / name).write_text(small(text))
    (place / "prompts.txt").write_text("a lighthouse at dusk\na red bicycle\n")
    write_own_data(images, place)
    with serving() as server:
        write_list(place / "list.parquet", [(f"{server}/good/{number}.jpg", "a caption") for number in range(3)])
        yield place


def write_own_data(images, place):
    """The same images as a folder with texts, tars, a table and a saved dataset."""
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


@pytest.fixture(scope="module")
def bucket_of_the_pages(s3_server, desk):
    """The environment in which the bucket of the pages exists, with tars in it."""
    create()
    fill("tars", desk / "tars")
    return {**environment(s3_server), "XDG_CACHE_HOME": str(desk / "home")}


@pytest.fixture
def at_desk(desk, bucket_of_the_pages, monkeypatch):
    """This process in that directory, with img2dataset on the PATH."""
    for name, value in bucket_of_the_pages.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(desk)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", desk / "library")
    monkeypatch.setattr("pipeline.cache.trial.SECONDS", 0.0)
    if IMG2DATASET:
        monkeypatch.setenv("PATH", f"{Path(IMG2DATASET).parent}:{os.environ['PATH']}")
    return desk


def run_make(command: str, variables: str, cwd: Path) -> subprocess.CompletedProcess:
    """A make command in a shell, with this test's environment in place of the one that make would create."""
    here = f"-f {ROOT}/Makefile VENV={sys.prefix} -o {sys.prefix}/.ready"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        f"{small(command)} {here} {variables}", shell=True, cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def run_in_process(command: str) -> None:
    """Without the reports of all trainings but one, which would take longer than the rest. What waits for another
    command is interrupted."""
    arguments = shlex.split(small(command))[1:]
    if "--window" in arguments:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.cache.rolling.time.sleep", interrupted)
            result = CliRunner().invoke(main, arguments)
        reset_accelerate()
        assert result.exit_code == 130, result.output
        assert "Waiting for a reader" in result.output
        return
    if arguments[0] in ("distill", "finetune") and "student/" not in arguments and "--dry-run" not in arguments:
        arguments.append("--no-report")
    result = CliRunner().invoke(main, arguments)
    reset_accelerate()
    if result.exit_code:
        raised = "".join(traceback.format_exception(*result.exc_info)) if result.exc_info else ""
        pytest.fail(f"{command}\n{result.output}\n{raised}")


def test_make_distill_alone_runs_the_demo(desk):
    """The scenes are made, and then the commands that make starts are run in one process."""
    assert "make distill" in MAKE
    started = run_make("make distill", "LAUNCH=echo SCENES=12 ROUNDS=1 SAMPLES=1 STEPS=2 BATCH=2", desk).stdout
    lines = re.findall(r"^-m pipeline\.(\w+) (.*)$", started, re.MULTILINE)
    stages = [f"{stage.replace('_', '-')} {arguments}" for stage, arguments in lines]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "commands.py", *stages],
        cwd=desk,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (desk / "work" / "demo" / "sd_small" / "report.html").is_file()
    # Nothing but progress is printed besides: no library's warnings or bars.
    bars = r"(scenes|encode|calibrate|teacher-cache|teacher's samples|distill|(untrained )?student|timing .*): "
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip()]
    assert lines
    assert [line for line in lines if not re.match(bars, line)] == []


@pytest.mark.parametrize(
    ("variables", "teacher", "level", "resolution", "work"),
    [
        ("", "demo", "sd_small", 64, "work/demo"),
        ("FAMILY=sdxl", "demo-xl", "sdxl_small", 64, "work/demo-xl"),
        ("FAMILY=sdxl LEVEL=vega", "demo-xl", "vega", 64, "work/demo-xl"),
        ("FAMILY=sdxl TEACHER=xl DATA=images", "xl", "sdxl_small", 1024, "work"),
    ],
)
def test_a_family_chooses_teacher_level_and_resolution(tmp_path, variables, teacher, level, resolution, work):
    shown = run_make(f"make distill {variables}", "-n", tmp_path).stdout
    stages = dict(re.findall(r"-m pipeline\.(\w+) (.*)", re.sub(r"\s*\\\n\s*", " ", shown)))
    assert f"--teacher '{teacher}' " in stages["encode"]
    assert f"--resolution {resolution} " in stages["encode"]
    assert f"--teacher '{teacher}' --latents '{work}/latents' " in stages["teacher_cache"]
    assert f"--students {level} " in stages["teacher_cache"]
    assert f"--out '{work}/{level}' --level {level} " in stages["distill"]
    assert ("demo-scenes" in shown) == (teacher != "xl")


def test_another_family_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="FAMILY=flux is not one of sd, sdxl"):
        run_make("make distill FAMILY=flux", "-n", tmp_path)


def test_make_distill_runs_all_stages_on_a_checkpoint(at_desk):
    """The commands that make would start are run here, in one process."""
    command = next(command for command in MAKE if command.startswith("make distill TEACHER"))
    shown = run_make(command, "-n RESOLUTION=32", at_desk).stdout
    stages = re.findall(r"-m pipeline\.(\w+) (.*)", re.sub(r"\s*\\\n\s*", " ", shown))
    assert [stage for stage, _ in stages] == ["encode", "teacher_cache", "distill"]
    for stage, arguments in stages:
        run_in_process(f"distill-sd {stage.replace('_', '-')} {arguments}")
    desk = at_desk
    assert (desk / "work" / "sd_small" / "model_index.json").is_file()


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if c.startswith("distill-sd ")])
def test_every_command_runs_as_written(command, at_desk):
    if "student-int8" in command:
        pytest.importorskip("modelopt")
    if "downloaded/" in command and not IMG2DATASET:
        pytest.skip("img2dataset is not installed")
    if "--engine ray" in command and find_spec("ray") is None:
        pytest.skip("ray is not installed")
    run_in_process(command)


def test_the_commands_leave_a_student_and_the_downloaded_images(desk):
    assert (desk / "student" / "model_index.json").is_file()
    assert (desk / "student.safetensors").is_file()
    assert not IMG2DATASET or (desk / "downloaded" / "00000.tar").is_file()


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if not c.startswith("make ")])
def test_every_command_takes_its_options(command, at_desk):
    """Also those that are not run: they need several devices."""
    if command.startswith("distill-sd "):
        _, name, arguments = command.split(" ", 2)
        made = main.commands[name]
    else:
        _, name, arguments = re.split(r" -m (\S+) ", command)
        made = importlib.import_module(name).command
    made.make_context(name, shlex.split(arguments))


@pytest.mark.parametrize("page", [page for page in PAGES if snippets_of(page)])
def test_the_snippets_of_a_page_run(page, at_desk, monkeypatch):
    """Images take two steps."""
    from diffusers import StableDiffusionPipeline

    real = StableDiffusionPipeline.__call__
    monkeypatch.setattr(
        StableDiffusionPipeline, "__call__", lambda self, *a, **k: real(self, *a, **{**k, "num_inference_steps": 2})
    )
    for snippet in snippets_of(page):
        exec(compile(small(snippet), page, "exec"), {})
        reset_accelerate()
        for image in re.findall(r'\.save\("(.*?)"\)', snippet):
            assert (at_desk / image).is_file()


def test_every_command_is_on_a_page():
    named = {command.split()[1] for command in ALL_COMMANDS if command.startswith("distill-sd ")}
    assert named >= main.commands.keys() - {"demo-teacher"}


def options_of(command: click.Command) -> set[str]:
    return {
        name
        for option in command.params
        if isinstance(option, click.Option)
        for name in option.opts + option.secondary_opts
    }


def test_every_option_named_exists():
    known = set.union(FOREIGN_OPTIONS, *map(options_of, main.commands.values()))
    for page in PAGES:
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", TEXTS[page])) <= known, page


def test_every_make_target_and_variable_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {command.split()[1] for command in MAKE} >= {"encode", "teacher-cache", "distill", "test"}
    for command in MAKE:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
        for variable in re.findall(r" ([A-Z_]+)=", command):
            assert re.search(rf"^{variable} +\?=", makefile, re.MULTILINE), command


def test_every_extra_named_exists():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "pipeline").rglob("*.py")]
    texts = "\n".join([*TEXTS.values(), *sources])
    named = set(re.findall(r"(?:distill-sd|'\.)\[([a-z0-9]+)\]|install_command\('([a-z0-9]+)'\)", texts))
    named = {extra for pair in named for extra in pair if extra}
    assert named >= {"datasets", "evaluate", "int8", "lora", "onnx", "tensorboard"}
    _, extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")
    assert named <= set(re.findall(r"^([a-z0-9]+) = ", extras.split("\n[")[0], re.MULTILINE))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *BENCHMARKS])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXTS[page]):
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_all_pages_are_tested():
    assert set(DOCS) == {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline" / "docs").glob("*.md")}


def tree_of(text: str) -> dict[str, str]:
    """path -> description of the lines in the first block of the architecture page that shows a tree."""
    block = next(block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if block.startswith("pipeline/"))
    found, folders = {}, []
    for line in filter(str.strip, block.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, description = line.strip().partition(" ")
        folders = [*folders[:depth], name]
        found["".join(folders)] = description.strip()
    return found


def test_the_tree_lists_every_file_and_says_what_it_does():
    listed = {path: description for path, description in tree_of(TEXTS[ARCHITECTURE]).items() if path.endswith(".py")}
    files = [path for package in ("pipeline", "shards") for path in (ROOT / package).rglob("*.py")]
    assert set(listed) == {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    assert all(listed.values())


def test_the_floors_on_the_page_are_those_that_are_tested():
    (block,) = re.findall(r"```\n(cli .*?)```", TEXTS[ARCHITECTURE], re.DOTALL)
    *floors, lowest = [set(line.split()) for line in block.splitlines()]
    assert tuple(reversed(floors)) == FLOORS
    assert lowest == {"shards"}


@pytest.mark.parametrize(
    ("codec", "level"), [*((c, "sd_small") for c in ("dither", "fp16", "fp32")), ("dither", "vega")]
)
def test_the_reader_on_the_format_page_reads_what_the_dataset_reads(
    codec, level, teacher, xl_teacher, images, tmp_path, monkeypatch
):
    source = xl_teacher if level == "vega" else teacher
    latents = run_encode(source, images, tmp_path / "latents")
    options = {"codec": codec, "students": (level,), "uncond_fraction": 0.5, "input_perturbation": 0.1}
    run_teacher_cache(source, latents, tmp_path / "cache", **options)
    monkeypatch.chdir(tmp_path)
    reader: dict = {}
    exec(compile(snippets_of(FORMAT)[0], FORMAT, "exec"), reader)
    cache, images = reader["cache"], reader["images"]
    given = reader["manifest"], reader["calibration"]
    entries = [
        (reader["key_of"](*place[1:]), *reader["read_joined"](cache, place, images[i % 13], *given))
        for i, place in enumerate(reader["entries"])
    ]

    dataset = CacheDataset(open_store("cache"), list(reader["read_manifest"](cache)["spec"]["taps"]))
    assert len(entries) == len(dataset) == 26
    calibrations = dataset.calibrations()
    for index, (key, meta, tensors) in enumerate(entries):
        batch = dataset.collate([dataset[index]])
        assert (key, meta["timestep"]) == (batch.keys[0], batch.timesteps.item())
        expected = {
            "latents": batch.latents,
            "noise": batch.noise,
            "input_noise": batch.input_noise,
            "teacher_pred": batch.teacher_pred,
            **batch.conditioning,
            **{f"tap.{tap}": feature.decode(calibrations.get(tap)) for tap, feature in batch.features.items()},
        }
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(tensors[name], tensor[0].numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_example_of_a_source_is_one(tmp_path, images):
    (tmp_path / "captions.txt").write_text("one\ntwo\n")
    for number in range(2):
        shutil.copy(images / f"{number:03d}.png", tmp_path / f"{number}.png")
    example: dict = {}
    exec(compile(snippets_of(CONTRIBUTING)[0], CONTRIBUTING, "exec"), example)
    source = OpenSource(example["NumberedImages"](tmp_path), DataSettings(data="numbered"))
    assert [(record.source_id, record.caption) for record in source.records] == [("0.png", "one"), ("1.png", "two")]
    assert source.read(source.records[1]) == (images / "001.png").read_bytes()
