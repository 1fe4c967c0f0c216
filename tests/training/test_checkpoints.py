"""Checkpoints and finished students: damage is told and never trained on, and a resumed run's lines are the others'."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from support import sidecars
from support.stages import metrics, prepared, run_distill, state_dict_of, tree

from pipeline.commands import distill
from pipeline.system.errors import UserError
from pipeline.system.jsonl import read_jsonl
from pipeline.training.objective import Objective
from shards.schema import ShardError


@pytest.fixture(scope="module")
def cache(cache_of_one_round):
    return cache_of_one_round


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """Checkpoints of the steps 2 and 4, with EMA."""
    place = tmp_path_factory.mktemp("trained") / "out"
    return run_distill(cache, place, checkpointing_steps=2, use_ema=True)


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)


def resume(cache, out, steps=6):
    return run_distill(cache, out, max_train_steps=steps, checkpointing_steps=2, use_ema=True)


def test_where_the_average_is_kept_may_change_and_changes_no_bit(cache, trained, out, tmp_path):
    shutil.rmtree(out / "checkpoints" / "step-0000004")
    (out / "finished.json").unlink()
    run_distill(cache, out, checkpointing_steps=2, use_ema=True, ema_device="cpu")
    expected, found = state_dict_of(trained / "unet"), state_dict_of(out / "unet")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    with pytest.raises(UserError, match="--ema-device cpu is for the average of --use-ema"):
        run_distill(cache, tmp_path / "other", ema_device="cpu")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("unet/diffusion_pytorch_model.safetensors", 0.3),
        ("unet/config.json", 0.5),
        ("state.pt", 0.5),
        ("state.pt", 0.9),
    ],
)
def test_a_flipped_bit_in_a_checkpoint_is_told_with_the_older_one(cache, out, name, where):
    path = out / "checkpoints" / "step-0000004"
    data = path.joinpath("state.pt").read_bytes()
    # Between the parts of a zip file lie zeros, which are nobody's; flip a bit of a tensor.
    if name == "state.pt":
        largest = max(torch.load(path / name, weights_only=True)["ema"]["shadow_params"], key=torch.numel)
        where = (data.index(largest.contiguous().numpy().tobytes()) + where * 4 * largest.numel()) / len(data)
    flip(path / name, where)
    with pytest.raises(UserError, match=f"{path} cannot be read .*{name}.*Delete it to resume from step-0000002"):
        resume(cache, out)
    shutil.rmtree(path)
    resume(cache, out)
    assert metrics(out)[-1]["step"] == 6


def test_a_damaged_only_checkpoint_has_a_remedy_too(cache, out):
    shutil.rmtree(out / "checkpoints" / "step-0000002")
    flip(out / "checkpoints" / "step-0000004" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="Delete it to start from the beginning; there is no older one"):
        resume(cache, out)


def test_a_checkpoint_without_checksums_is_resumed(cache, out):
    """As earlier versions wrote it."""
    path = out / "checkpoints" / "step-0000004"
    (path / "unet" / "checksums.json").unlink()
    state = torch.load(path / "state.pt", weights_only=True)
    del state["metrics"]
    torch.save(state, path / "state.pt")
    resume(cache, out)
    assert metrics(out)[-1]["step"] == 6


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def shorter(state):
    state["optimizer"]["state"].popitem()
    state["optimizer"]["param_groups"][0]["params"].pop()
    return state


def of_other_shapes(state):
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].flatten()[:1]
    return state


def with_other_ema(state):
    state["ema"]["shadow_params"] = [tensor.flatten() for tensor in state["ema"]["shadow_params"]]
    return state


@pytest.mark.parametrize(
    ("change", "told"),
    [
        *((without(name), name) for name in ("step", "position", "optimizer", "lr_scheduler", "ema", "scaler")),
        (lambda state: {**state, "position": -5}, "position -5"),
        (lambda state: {**state, "position": "5"}, "position '5'"),
        (lambda state: {**state, "step": "4"}, "of step '4'"),
        (lambda state: {**state, "step": 3}, "of step 3"),
        (lambda state: {**state, "step": True}, "of step True"),
        (lambda state: {**state, "optimizer": {}}, ""),
        (lambda state: {**state, "optimizer": []}, "optimizer"),
        (lambda state: {**state, "ema": None}, "--use-ema"),
        (lambda state: list(state), "holds a list"),
        (shorter, "parameter group"),
        (of_other_shapes, "exp_avg has shape"),
        (with_other_ema, "EMA is of another student"),
    ],
)
def test_a_state_of_another_training_is_told_in_a_sentence(cache, out, change, told):
    path = out / "checkpoints" / "step-0000004"
    torch.save(change(torch.load(path / "state.pt", weights_only=True)), path / "state.pt")
    with pytest.raises(UserError, match=f"{path} cannot be read") as caught:
        prepared(cache, out, level="sd_small", use_ema=True)
    assert told in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_a_flipped_bit_in_a_finished_student_is_told_and_mended_by_the_remedy(cache, out, trained, name):
    file = out / name
    flip(file)
    with pytest.raises(UserError, match=re.escape(f"{file} was changed, though the training is finished. Delete ")):
        resume(cache, out, steps=4)
    (out / "finished.json").unlink()
    resume(cache, out, steps=4)
    assert file.read_bytes() == (trained / name).read_bytes()


def test_the_settings_are_those_of_the_result(cache, out):
    """A student that is trained further states it; one that needs no training stays as it is."""
    resume(cache, out, steps=5)
    stated = json.loads((out / "distill.json").read_text())
    assert stated["max_train_steps"] == 5
    resume(cache, out, steps=4)
    assert json.loads((out / "distill.json").read_text()) == stated


def test_a_cache_whose_shards_were_made_again_otherwise_is_refused(cache, out, tmp_path):
    other = shutil.copytree(cache, tmp_path / "cache")
    sidecars.of_another_writing(next((other / "images").glob("s*.index")))
    before = tree(out)
    with pytest.raises(ShardError, match="shards_sha256: "):
        resume(other, out)
    assert tree(out) == before
    # One of an earlier version stated nothing of it.
    spec = json.loads((out / "spec.json").read_text())
    del spec["shards_sha256"]
    (out / "spec.json").write_text(json.dumps(spec))
    resume(cache, out)


def test_a_lost_weight_file_of_a_finished_student_is_told(cache, out):
    (out / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="vae/diffusion_pytorch_model.safetensors is missing"):
        resume(cache, out, steps=4)


def test_a_student_that_was_finished_without_checksums_is_left_alone(cache, out, capsys):
    (out / "finished.json").write_text('{"step": 4}')
    before = tree(out)
    resume(cache, out, steps=4)
    assert "already finished, nothing to do" in capsys.readouterr().out
    assert tree(out) == before


class Killed(BaseException):
    pass


def test_a_student_that_was_half_saved_is_not_called_finished(cache, out, monkeypatch):
    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(distill, "write_model_card", killed)
        with pytest.raises(Killed):
            resume(cache, out, steps=6)
    assert not (out / "finished.json").exists()
    resume(cache, out, steps=6)
    assert json.loads((out / "finished.json").read_text())["step"] == 6


BROKEN = {
    "lost": None,
    "empty": b"",
    "cut": b'{"step": 2, "lo\n',
    "not text": b"\xff\xfe\n",
    "nested": b"[" * 100_000 + b"\n",
    "not an object": b"3\n[]\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_lines_that_hold_no_object_are_left_out(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert read_jsonl(path) == []
    path.write_bytes((content or b"") + b'{"step": 1}\n')
    assert read_jsonl(path) == [{"step": 1}]


def test_lost_metrics_stop_neither_training_nor_report(cache, out):
    path = out / "metrics.jsonl"
    path.write_bytes(b'{"step": "2"}\n{"loss": 1}\n{"st')
    resume(cache, out)
    assert [line["step"] for line in metrics(out)] == [5, 6]
    path.write_bytes(b'{"step": 2}\n{}\n')
    (out / "README.md").unlink()
    run_distill(cache, out, max_train_steps=6, checkpointing_steps=2, use_ema=True, report=True)
    assert "The metrics of this training are lost." in (out / "report.html").read_text()


def test_an_interrupted_runs_lines_are_those_of_one_that_was_not(cache, tmp_path, monkeypatch):
    """Between two lines too: the next one's means begin where the last one's ended."""
    changes = {"max_train_steps": 8, "logging_steps": 4, "gradient_accumulation_steps": 2}
    whole = run_distill(cache, tmp_path / "whole", **changes)
    real, calls = Objective.losses, []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "losses", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run_distill(cache, tmp_path / "out", **changes)
    assert (tmp_path / "out" / "checkpoints" / "step-0000006").is_dir()
    out = run_distill(cache, tmp_path / "out", **changes)
    timeless = [[line | {"samples_per_second": 0, "seconds": 0} for line in metrics(folder)] for folder in (whole, out)]
    assert [line["step"] for line in timeless[0]] == [1, 4, 8]
    assert timeless[0] == timeless[1]
    left, right = state_dict_of(whole / "unet"), state_dict_of(out / "unet")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_averages_have_the_memory_format_of_their_parameters(cache, out):
    """A checkpoint of another device may hold them in another one, and averaging would be slow."""
    path = out / "checkpoints" / "step-0000004" / "state.pt"
    state = torch.load(path, weights_only=True)
    shadows = state["ema"]["shadow_params"]
    state["ema"]["shadow_params"] = [
        shadow.contiguous(memory_format=torch.channels_last) if shadow.ndim == 4 else shadow for shadow in shadows
    ]
    torch.save(state, path)
    _, training = prepared(cache, out, level="sd_small", use_ema=True)
    assert training.step == 4
    for parameter, shadow, saved in zip(training.trained, training.ema.shadow_params, shadows, strict=True):
        assert shadow.stride() == parameter.stride()
        assert torch.equal(shadow, saved)
