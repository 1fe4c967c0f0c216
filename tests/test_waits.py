"""Whatever takes seconds with a real checkpoint is said on stderr: loading networks, hashing and copying them."""

import pytest
import yaml
from click.testing import CliRunner
from support.stages import pruned_pipeline, reset_accelerate
from torch import nn

from pipeline.cli import main
from pipeline.models.hashing import weights_sha256
from pipeline.system.disk import size_of
from pipeline.system.echo import LONG_WAIT, say_wait

# What each command says that it loads or hashes. In the options, {name} is a path of the fixture `places`.
WAITS = {
    "encode --teacher {teacher} --data {images} --out {out} --resolution 32 --dry-run": [
        "loading {teacher}/vae, ",
        "loading {teacher}/text_encoder, ",
        "hashing AutoencoderKL: ",
        "hashing CLIPTextModel: ",
    ],
    "teacher-cache --teacher {teacher} --latents {latents} --out {out} --dry-run": ["loading {teacher}/vae, "],
    "teacher-cache --teacher {teacher} --latents {latents} --out {out} --rounds 1 --samples 0": [
        "copying {teacher}/vae, ",
        "writing {out}/students/sd_small, ",
        "hashing {out}/students/sd_small/diffusion_pytorch_model.safetensors, ",
    ],
    "plan --teacher {teacher} --images 9 --resolution 32 --trial --batch-size 2": ["loading {teacher}/unet, "],
    "distill --cache {cache} --out {out} --level sd_small --max-train-steps 1 --train-batch-size 2 --no-report": [
        "hashing {cache}/students/sd_small/diffusion_pytorch_model.safetensors, ",
        "loading {cache}/students/sd_small, ",
        "copying {cache}/base/vae, ",
        "writing {out}/unet, ",
    ],
    "finetune --model {teacher} --latents {latents} --out {out} --max-train-steps 1 --dry-run": [
        "loading {teacher}/unet, ",
        "hashing CLIPTextModel: ",
    ],
    "evaluate --teacher {teacher} --student {student} --out {out} --dry-run": [
        "loading {teacher}/unet, ",
        "loading {student}/unet, ",
        "loading {student}/vae, ",
        "hashing UNet2DConditionModel: ",
    ],
    "export --model {teacher} --format single-file --out {out}.safetensors": [
        "loading {teacher}/unet, ",
        "writing {out}.safetensors, ",
    ],
    "verify {cache} --recompute 1 --teacher {teacher}": ["loading {teacher}/unet, ", "hashing UNet2DConditionModel: "],
}


@pytest.fixture(scope="module")
def places(teacher, images, latents, cache_of_one_round, tmp_path_factory):
    student = tmp_path_factory.mktemp("waits") / "student"
    pruned_pipeline("sd_small").save_pretrained(student)
    return {"teacher": teacher, "images": images, "student": student, "latents": latents, "cache": cache_of_one_round}


@pytest.mark.parametrize("command", WAITS)
def test_what_a_command_waits_for_is_said_on_stderr(command, places, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.system.echo.LONG_WAIT", 1)
    monkeypatch.setattr("pipeline.models.hashing.DELAY", 0)
    monkeypatch.setattr("pipeline.cache.trial.SECONDS", 0.0)
    paths = {**places, "out": tmp_path / "out"}
    result = CliRunner().invoke(main, command.format(**paths).split())
    reset_accelerate()
    assert result.exit_code == 0, result.output
    for expected in WAITS[command]:
        assert expected.format(**paths) in result.stderr
    assert "loading " not in result.stdout
    if "--dry-run" in command:
        assert yaml.safe_load(result.stdout)["out"] == str(tmp_path / "out")


def test_a_wait_is_told_with_its_bytes(tmp_path, capsys):
    for name in "ab":
        with open(tmp_path / name, "wb") as file:
            file.truncate(LONG_WAIT // 2)
    say_wait("loading model/unet", size_of([tmp_path / "a", tmp_path / "b", tmp_path, tmp_path / "missing"]))
    assert capsys.readouterr() == ("", "loading model/unet, 200 MB\n")


def test_a_short_wait_is_not_told(capsys):
    say_wait("loading model/unet", LONG_WAIT - 1)
    weights_sha256(nn.Linear(2, 2))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_one_process_of_a_machine_tells_it(rank, told, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("pipeline.models.hashing.DELAY", 0)
    say_wait("loading model/unet", LONG_WAIT)
    weights_sha256(nn.Linear(2, 2))
    said = capsys.readouterr().err
    assert ("loading model/unet" in said, "hashing Linear: 100%" in said) == (told, told)
