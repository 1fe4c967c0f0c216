"""The commands as a user types them: the three stages, exit statuses, help, dry runs, the Makefile."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.processes import in_two_processes
from support.stages import reset_accelerate, run_encode, run_teacher_cache, shard_files, state_dict_of, tree
from support.tiny import write_images

from pipeline.cli import main
from pipeline.distill import DistillSettings
from pipeline.encode import EncodeSettings
from pipeline.models.levels import LEVELS
from pipeline.teacher_cache import TeacherCacheSettings
from shards.dataset import CacheDataset, EpochBatches
from shards.manifest import read_manifest
from shards.sidecar import read_sidecar
from shards.store import open_store

pytestmark = pytest.mark.usefixtures("few_steps")

ROOT = Path(__file__).parent.parent
STAGES = {"encode": EncodeSettings, "teacher-cache": TeacherCacheSettings, "distill": DistillSettings}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    reset_accelerate()
    return result


# The commands of the interface, with every option that it names.
ROAD = [
    "encode --teacher {teacher} --data {images} --out latents --resolution 32 --center-crop --random-flip "
    "--batch-size 4 --seed 0 --entries-per-shard 5",
    "teacher-cache --teacher {teacher} --latents latents --out cache --rounds 2 --codec dither --snr-db 15 "
    "--tokens 16 --students sd_small,sd_tiny",
    "distill --cache cache --out student --level sd_tiny --max-train-steps 3 --train-batch-size 2 "
    "--learning-rate 1e-4 --output-weight 0.5 --feature-weight 0.5 --use-ema",
]


@pytest.fixture(scope="module")
def road(teacher, images, tmp_path_factory):
    """The three commands, one after the other."""
    work = tmp_path_factory.mktemp("road")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        return work, [invoke(*command.format(teacher=teacher, images=images).split()) for command in ROAD]


def test_the_three_stages_end_in_a_student(road):
    work, results = road
    assert [r.exit_code for r in results] == [0, 0, 0], [r.output for r in results]
    assert "holds 13 images in 3 shards" in results[0].stdout
    assert "holds 26 entries (2 rounds)" in results[1].stdout
    assert "holds the sd_tiny student of 3 steps" in results[2].stdout
    assert (work / "student" / "model_index.json").is_file()


def test_progress_bars_show_rate_and_the_terms_and_nothing_else_is_printed(road):
    _, results = road
    for result, unit in zip(results, ("image", "entry", "step"), strict=True):
        lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip()]
        bars = r"(encode|calibrate|teacher-cache|teacher's samples|distill|(untrained )?student|timing .*): "
        assert all(re.match(bars, line) for line in lines), lines
        assert re.search(rf"100%.*({unit}/s|s/{unit})", result.stderr)
    assert re.search(r"loss=.*task=.*output=.*feature=", results[2].stderr)


def test_settings_are_written_next_to_the_output(road):
    work, _ = road
    assert json.loads((work / "latents" / "encode.json").read_text())["resolution"] == 32
    assert json.loads((work / "cache" / "teacher-cache.json").read_text())["students"] == ["sd_small", "sd_tiny"]
    assert json.loads((work / "student" / "distill.json").read_text())["use_ema"] is True


def as_shown(setting):
    """A default as --help shows it."""
    default, name = setting.default, setting.name.replace("_", "-")
    if isinstance(default, bool):
        return name if default else f"no-{name}"
    if isinstance(default, tuple):
        return f"({','.join(default)})"
    return str(default)


@pytest.mark.parametrize("stage", STAGES)
def test_an_option_has_the_default_and_the_help_of_its_setting(stage):
    """The options left out give the settings' own defaults, and --help shows both."""
    options = {option.name: option for option in main.get_command(None, stage).params}
    shown = re.sub(r"\s+", "", invoke(stage, "--help").output)
    for setting in fields(STAGES[stage]):
        option = options.pop(setting.name)
        assert option.required == (setting.default is MISSING)
        assert re.sub(r"\s+", "", setting.metadata["help"]) in shown
        if not option.required:
            assert option.default == setting.default
            assert setting.default is None or f"[default:{as_shown(setting)}]" in shown
    shown_too = [name for name, option in options.items() if not option.hidden]
    assert shown_too == ["config", "preset", "check", "dry_run"]


def test_the_umbrella_lists_the_stages():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in (*STAGES, "verify", "inspect", "demo-scenes", "demo-teacher"):
        assert f"  {command} " in result.output


def test_dry_runs_print_the_plan_and_write_nothing(road, teacher, images, tmp_path):
    work, _ = road
    before = tree(work)
    out = tmp_path / "out"
    encode = invoke("encode", "--teacher", teacher, "--data", images, "--out", out, "--resolution", 32, "--dry-run")
    cache = invoke("teacher-cache", "--teacher", teacher, "--latents", work / "latents", "--out", out, "--dry-run")
    distill = invoke("distill", "--cache", work / "cache", "--out", out, "--level", "sd_small", "--dry-run")
    assert "entries: 13 in 1 shard, 1 of them still to write" in encode.output
    assert "13 images x 4 rounds = 52" in cache.output
    assert "teacher forward passes: 52" in cache.output
    assert "steps: 15000, 0 of them done" in distill.output
    for result in (encode, cache, distill):
        assert result.exit_code == 0, result.output
        assert '"seed": 0' in result.output
        assert "dry run: nothing was written" in result.output
    assert not out.exists()
    assert tree(work) == before


def test_a_dry_run_of_a_training_reads_its_prompts(road, tmp_path):
    work, _ = road
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    os.mkfifo(tmp_path / "fifo")
    common = ["--out", tmp_path / "out", "--validation-steps", 5, "--dry-run", "--validation-prompts"]
    for training in (
        ["distill", "--cache", work / "cache", "--level", "sd_small"],
        ["finetune", "--latents", work / "latents", "--model", work / "student"],
    ):
        result = invoke(*training, *common, tmp_path / "prompts.txt")
        assert "validation images: 2 every 5 steps" in result.output, result.output
        for name, problem in (
            ("latin.txt", "latin.txt is not UTF-8"),
            ("missing.txt", "missing.txt cannot be read (No such file"),
            ("fifo", "--validation-prompts"),
        ):
            result = invoke(*training, *common, tmp_path / name)
            assert result.exit_code == 2
            assert problem in result.output


def test_the_dry_runs_bytes_are_those_of_a_real_entry(road, teacher, tmp_path):
    work, _ = road
    cache = ["teacher-cache", "--teacher", teacher, "--latents", work / "latents", "--out", tmp_path / "out"]
    cache += ["--rounds", 1, "--codec", "fp16"]
    result = invoke(*cache, "--dry-run")
    planned = int(re.search(r"on disk +([\d,]+)", result.output)[1].replace(",", ""))
    named = dict(re.findall(r"^#   ([a-z_.0-9]+) +([\d,]+)$", result.output, re.MULTILINE))
    invoke(*cache)
    store = open_store(tmp_path / "out")
    sidecar = read_sidecar(store, "r0000-s00000.tar", read_manifest(store, "cache"))
    for name, (_, length, _, _) in sidecar.row(0).members.items():
        if name.endswith(".npy"):
            assert int(named[name.removesuffix(".npy").removeprefix("tap.")].replace(",", "")) == length
    files = [tmp_path / "out" / name for name in ("r0000-s00000.tar", "r0000-s00000.index")]
    written = sum(file.stat().st_size for file in files) / sidecar.count
    assert planned == pytest.approx(written, rel=0.1)


# A later option overrides an earlier one, so each case shows only what is wrong.
ENCODE = "encode --teacher {teacher} --data {images} --out {o} "
CACHE = "teacher-cache --teacher {teacher} --latents {road}/latents --out {o} "
DISTILL = "distill --cache {road}/cache --out {o} --level sd_small "
FIXABLE = {
    ENCODE + "--data nowhere": "--data nowhere does not exist",
    ENCODE + "--teacher nowhere/at/all": "--teacher nowhere/at/all is not a folder",
    ENCODE + "--teacher some/name": "--teacher some/name is not a folder, and no hub can be asked",
    ENCODE + "--teacher {images}": "has no model_index.json",
    ENCODE + "--resolution 33": "--resolution 33 is not a multiple of 2",
    ENCODE + "--batch-size 0": "--batch-size is 0; it must be at least 1",
    ENCODE + "--batch-size many": "'many' is not a valid integer",
    ENCODE
    + "--caption-column label": "no 'label' in any line. It has 'file_name', 'text': choose one with --caption-column",
    "encode --teacher {teacher} --data {images}": "Missing option '--out'",
    CACHE + "--latents {images}": "has no manifest.json",
    CACHE + "--latents {road}/nowhere": "/nowhere does not exist. Check the path, or make it with",
    DISTILL + "--cache {road}/nowhere": "/nowhere does not exist. Check the path, or make it with",
    DISTILL + "--cache {blocked}": "blocked is a file, not a directory",
    CACHE + "--latents {road}/cache": "describes cache, not latents",
    CACHE + "--students sd_smal": "--students 'sd_smal' is not one of sd_small, sd_tiny, bk_base",
    CACHE + "--students sd_tinny": "sdxl_tiny. Did you mean sd_tiny?",
    CACHE + "--students ,": "--students names no level",
    CACHE + "--uncond-fraction 1.5": "--uncond-fraction is 1.5; it must be at most 1.0",
    CACHE + "--out {road}/cache --rounds 2 --seed 9": "seed: 0 -> 9",
    DISTILL + "--cache {road}/latents": "describes latents, not cache",
    DISTILL + "--level sd_huge": "'sd_huge' is not one of sd_small, sd_tiny, bk_base, bk_small, bk_tiny",
    DISTILL + "--level sd_smal": "Did you mean sd_small?",
    DISTILL + "--out {road}/student": 'level: "sd_tiny" -> "sd_small"',
    DISTILL + "--lr-warmup-steps 5": "Use constant_with_warmup",
    DISTILL + "--learning-rate nan": "--learning-rate is nan; it must be a finite number",
    DISTILL + "--adam-beta1 1": "--adam-beta1 is 1.0; it must be less than 1.0",
    DISTILL + "--learning-rate 0": "--learning-rate is 0.0; it must be more than 0.0",
    DISTILL + "--out {blocked}/o": "blocked",
}


@pytest.mark.parametrize("command", FIXABLE, ids=[message[:40] for message in FIXABLE.values()])
def test_what_the_user_can_fix_ends_in_one_message_and_status_2(command, road, teacher, images, tmp_path):
    (tmp_path / "blocked").write_text("a file where a directory should be")
    result = invoke(
        *command.format(
            teacher=teacher, images=images, road=road[0], o=tmp_path / "o", blocked=tmp_path / "blocked"
        ).split()
    )
    assert result.exit_code == 2, result.output
    message = FIXABLE[command].replace("{road}", str(road[0])).replace("{blocked}", str(tmp_path / "blocked"))
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "o").exists()


def test_a_bug_keeps_its_traceback_and_ends_in_status_1(teacher, images, tmp_path, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("pipeline.cache.latents_writer.encode_batch", fail)
    result = invoke("encode", "--teacher", teacher, "--data", images, "--out", tmp_path / "o", "--resolution", 32)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_full_disk_is_reported_and_leaves_what_was_written(teacher, images, tmp_path, monkeypatch):
    import errno

    from pipeline.cache import latents_writer

    real, shards = latents_writer.write_shard, []

    def full(store, shard, *rest):
        if shards:
            raise OSError(errno.ENOSPC, "No space left on device", f"{store}/{shard}")
        shards.append(shard)
        real(store, shard, *rest)

    monkeypatch.setattr(latents_writer, "write_shard", full)
    arguments = [
        "encode",
        "--teacher",
        teacher,
        "--data",
        images,
        "--out",
        tmp_path / "o",
        "--resolution",
        32,
        "--entries-per-shard",
        5,
    ]
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "s00001.tar: No space left on device. Fix this and rerun the same command." in result.output
    monkeypatch.setattr(latents_writer, "write_shard", real)
    assert "holds 13 images in 3 shards" in invoke(*arguments).output


def test_accelerate_launch_starts_a_stage(teacher, images, tmp_path):
    launch = f"{sys.executable} -m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 "
    launch += "--mixed_precision no --dynamo_backend no -m pipeline."
    line = ROAD[0].format(teacher=teacher, images=images)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    result = subprocess.run((launch + line).split(), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "holds 13 images in 3 shards" in result.stdout


def test_two_processes_write_the_bytes_of_one(road, teacher, images, tmp_path):
    """Two processes share the shards out, and none differs; two train as one of twice the batch."""
    encode, cache, distill = (line.format(teacher=teacher, images=images) for line in ROAD)
    # A forked process cannot use this one's server of processes, which would generate the samples.
    printed = in_two_processes([encode, f"{cache} --samples 0", distill], tmp_path)
    for name in ("latents", "cache"):
        assert shard_files(tmp_path / name) == shard_files(road[0] / name)
    assert printed.count(" holds ") == 3
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    assert lines[-1]["epoch"] == pytest.approx(3 * 2 * 2 / 26)

    # ROAD's two processes of two entries each, in one process of four.
    alone = tmp_path / "alone"
    options = ROAD[2].replace("--train-batch-size 2", "--train-batch-size 4")
    options = options.replace("--cache cache --out student", f"--cache {tmp_path / 'cache'} --out {alone}")
    assert invoke(*options.split()).exit_code == 0
    *_, line = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    for name, value in line.items():
        assert name in ("samples_per_second", "seconds") or lines[-1][name] == pytest.approx(value, rel=1e-4), name
    left, right = state_dict_of(tmp_path / "student" / "unet"), state_dict_of(alone / "unet")
    # Where a gradient is next to nothing, Adam makes a whole step of its rounding: 3 steps of 1e-4 bound it.
    assert all((left[name] - right[name]).abs().max() < 6e-4 for name in left)
    errors = torch.cat([(left[name] - right[name]).flatten().abs() for name in left])
    assert (errors < 1e-6).float().mean() > 0.99


def make(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )


def test_make_help_lists_every_target_and_every_variable_with_its_default():
    listed = make("help").stdout
    for variable in re.findall(r"^(\w+) +\?=", (ROOT / "Makefile").read_text(), re.MULTILINE):
        assert re.search(rf"^ +{variable} ", listed, re.MULTILINE), variable
    assert re.search(r"^ +STEPS +750$", listed, re.MULTILINE)
    assert re.search(r"^ +STEPS +15000$", make("help", "TEACHER=some/sd").stdout, re.MULTILINE)
    for target in ("help", "install", "test", "lint", "encode", "teacher-cache", "distill", "clean"):
        assert re.search(rf"^ +{target} +\S", listed, re.MULTILINE), target


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (["LEVEL=sd_huge"], f"--students 'sd_huge' is not one of {', '.join(LEVELS)}"),
        (["LEVEL=sd_huge", "STUDENTS=sd_small"], "'sd_huge' is not one of"),
        (["STUDENTS=sd_small,sd_huge"], "--students 'sd_huge' is not one of"),
        (["STEPS=0"], "--max-train-steps is 0; it must be at least 1"),
        (["LR=fast"], "'fast' is not a valid float"),
        (["CODEC=zip"], "'zip' is not one of"),
        (["DISTILL_FLAGS=--use-emma"], "No such option '--use-emma'"),
    ],
)
def test_make_checks_the_options_of_every_stage_before_it_does_anything(tmp_path, variables, message):
    result = make("-o", f"{sys.prefix}/.ready", f"VENV={sys.prefix}", "distill", f"WORK={tmp_path / 'w'}", *variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "w").exists()


def test_make_takes_any_path(tmp_path):
    shown = make("-n", "distill", "WORK=it's here").stdout
    (arguments,) = re.findall(r"-m pipeline\.encode (.*)", re.sub(r"\s*\\\n\s*", " ", shown))
    assert "it's here/latents" in shlex.split(arguments)


def test_the_variables_of_make_arrive_in_the_settings():
    variables = "TEACHER=some/sd DATA=images WORK=w LEVEL=sd_tiny ROUNDS=7 STEPS=99 RESOLUTION=256 SNR_DB=12 "
    variables += "TOKENS=32 SAMPLES=3 GUIDANCE=4 BATCH=3 LR=2e-5 SEED=5 UNCOND=0.2 CODEC=dither"
    shown = make("-n", "distill", *variables.split()).stdout
    lines = re.findall(r"-m pipeline\.(\w+) (.*)", re.sub(r"\s*\\\n\s*", " ", shown))
    given = {}
    for module, arguments in lines:
        command = main.get_command(None, module.replace("_", "-"))
        values = command.make_context(module, shlex.split(arguments)).params
        given[module] = STAGES[module.replace("_", "-")](
            **{k: v for k, v in values.items() if k not in ("dry_run", "check")}
        )
    assert list(given) == ["encode", "teacher_cache", "distill"]
    encode, cache, distill = given.values()
    assert (encode.teacher, encode.data, encode.out, encode.resolution) == ("some/sd", "images", Path("w/latents"), 256)
    assert (cache.teacher, cache.latents, cache.out) == ("some/sd", encode.out, Path("w/cache"))
    assert (cache.rounds, cache.codec, cache.snr_db, cache.tokens) == (7, "dither", 12, 32)
    assert (cache.students, cache.samples, cache.samples_guidance, cache.uncond_fraction) == (("sd_tiny",), 3, 4, 0.2)
    assert (distill.cache, distill.out, distill.level) == (cache.out, Path("w/sd_tiny"), "sd_tiny")
    assert (distill.max_train_steps, distill.train_batch_size, distill.learning_rate) == (99, 3, 2e-5)
    assert {encode.seed, cache.seed, distill.seed} == {5}


def test_make_reports_what_is_missing():
    result = make("-o", f"{sys.prefix}/.ready", f"VENV={sys.prefix}", "encode", "TEACHER=some/sd")
    assert result.returncode == 2
    assert "set DATA= to a folder of images" in result.stderr


def test_make_alone_takes_the_demo(tmp_path):
    shown = make("-n", "distill", f"WORK={tmp_path}").stdout
    assert f"demo-scenes --out '{tmp_path}/scenes'" in shown
    assert f"-m pipeline.encode --teacher 'demo' --data '{tmp_path}/scenes'" in shown


def test_a_larger_set_in_several_shards_is_read_completely(teacher, tmp_path):
    """More shards than batches, uneven ones: every entry is taken once an epoch."""
    data = write_images(tmp_path / "data", 11, seed=3)
    latents = run_encode(teacher, data, tmp_path / "latents", entries_per_shard=4)
    cache = run_teacher_cache(teacher, latents, tmp_path / "cache", rounds=3, entries_per_shard=2)
    dataset = CacheDataset(open_store(cache), [])
    keys = [dataset[i].key for batch, _ in zip(EpochBatches(33, 3, 0), range(11), strict=False) for i in batch]
    assert len(keys) == len(set(keys)) == 33
