"""distill's options of optimisation and logging: each does what it says, or says what it lacks."""

import functools
import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import torch._dynamo
import torchao.optim
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from support.stages import (
    metrics,
    prepared,
    reset_accelerate,
    run_distill,
    state_dict_of,
)

from pipeline.distill import DistillSettings
from pipeline.sampling.generate import Sampler, generate
from pipeline.settings.training import resolve_steps_and_lr
from pipeline.system.errors import UserError
from pipeline.training.optimizer import check_moments, make_optimizer
from shards.schema import ShardError

pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture(scope="module")
def cache(cache_of_one_round):
    return cache_of_one_round


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A student of two steps and the same one of four, in one process each; not to be changed."""
    place = tmp_path_factory.mktemp("trained")
    return [run_distill(cache, place / str(steps), max_train_steps=steps) for steps in (2, 4)]


@pytest.fixture
def saved(trained, tmp_path):
    """A copy of the student of two steps."""
    return shutil.copytree(trained[0], tmp_path / "saved")


@pytest.fixture(scope="module")
def plain(trained):
    """The student of four steps."""
    return trained[1]


@pytest.mark.parametrize("part", [".", "unet"])
def test_a_saved_student_is_trained_on(cache, saved, tmp_path, part):
    _, training = prepared(cache, tmp_path / "out", level="sd_small", init_from=saved / part)
    begun, left = training.student.state_dict(), state_dict_of(saved / "unet")
    assert all(torch.equal(begun[name], left[name]) for name in left)


@pytest.mark.parametrize("change", ["missing", "spare"])
def test_a_saved_student_with_other_tensors_than_its_layers_is_refused(cache, saved, tmp_path, change):
    """The library would leave what is missing random, and what is spare out."""
    file = saved / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("up_blocks"))
    tensors["up_blocks.0.spare"] = tensors[name].clone()
    if change == "missing":
        del tensors["up_blocks.0.spare"], tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    named = name if change == "missing" else "up_blocks.0.spare"
    with pytest.raises(UserError, match=f"unet cannot be loaded .*{re.escape(named)}.* Pass a saved student"):
        run_distill(cache, tmp_path / "out", init_from=saved)


def test_a_saved_student_can_be_trained_on_without_distillation(cache, saved, tmp_path):
    out = run_distill(cache, tmp_path / "out", init_from=saved, output_weight=0.0, feature_weight=0.0)
    assert set(metrics(out)[0]) >= {"task", "loss"}
    assert not [name for name in metrics(out)[0] if name.startswith(("output", "feature"))]


def test_the_initial_student_is_part_of_the_spec(cache, plain, saved, tmp_path):
    out = run_distill(cache, tmp_path / "out", init_from=saved, max_train_steps=2)
    moved = saved.rename(tmp_path / "moved")
    run_distill(cache, out, init_from=moved, max_train_steps=4)
    with pytest.raises(ShardError, match="init_from"):
        run_distill(cache, out, init_from=plain, max_train_steps=6)


def test_a_student_of_another_level_is_refused(cache, saved, tmp_path):
    with pytest.raises(UserError, match="does not have the layers of sd_tiny"):
        run_distill(cache, tmp_path / "out", level="sd_tiny", init_from=saved)


def test_a_folder_without_a_student_is_refused(cache, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded .* Pass a saved student"):
        run_distill(cache, tmp_path / "out", init_from=tmp_path / "saved")


@pytest.mark.parametrize(
    ("epochs", "batch", "accumulation", "processes", "steps"),
    [(1, 4, 1, 1, 4), (2, 4, 1, 1, 7), (1, 13, 1, 1, 1), (3, 2, 2, 2, 5), (None, 4, 1, 1, 15000)],
)
def test_epochs_become_steps_that_see_every_entry(epochs, batch, accumulation, processes, steps):
    settings = DistillSettings(
        cache="c",
        out="o",
        level="sd_small",
        num_train_epochs=epochs,
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    assert resolve_steps_and_lr(settings, 13, processes).max_train_steps == steps


def test_an_epoch_is_trained_and_more_epochs_continue_it(cache, tmp_path):
    out = run_distill(cache, tmp_path / "out", max_train_steps=None, num_train_epochs=1)
    assert metrics(out)[-1]["step"] == 5
    run_distill(cache, out, max_train_steps=None, num_train_epochs=2)
    assert metrics(out)[-1]["step"] == 9


def test_steps_and_epochs_together_are_refused():
    with pytest.raises(UserError, match="both set the length of the training"):
        DistillSettings(cache="c", out="o", level="sd_small", max_train_steps=1, num_train_epochs=1)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_allowed_when_asked_for(cache, tmp_path, allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        run_distill(cache, tmp_path / "out", max_train_steps=1, allow_tf32=allowed)
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_a_compiled_student_trains_as_one_graph_with_its_taps(cache, tmp_path, monkeypatch):
    """Traced by dynamo and run eagerly: generating code takes a minute and a C++ compiler, and changes no tap."""
    plain = run_distill(cache, tmp_path / "plain", level="sd_tiny")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = run_distill(cache, tmp_path / "compiled", level="sd_tiny", compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    for x, y in zip(metrics(plain), metrics(compiled), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
    assert state_dict_of(compiled / "unet").keys() == state_dict_of(plain / "unet").keys()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_8_bit_adam_gets_the_settings_of_adam(tmp_path, monkeypatch, device):
    """bitsandbytes on a GPU, if it is installed."""

    class AdamW8bit(torch.optim.AdamW):
        pass

    stand_in = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    options = {"adam_weight_decay": 0.25, "adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 1e-6}
    settings = DistillSettings(
        cache=tmp_path, out=tmp_path, level="sd_small", use_8bit_adam=True, learning_rate=0.125, **options
    )
    weights = [torch.nn.Parameter(torch.ones(2))]
    optimizer = make_optimizer(weights, settings, torch.device(device))
    assert isinstance(optimizer, AdamW8bit if device == "cuda" else torchao.optim.AdamW8bit)
    given = optimizer.defaults
    assert (given["lr"], given["weight_decay"], given["betas"], given["eps"]) == (0.125, 0.25, (0.5, 0.75), 1e-6)
    assert optimizer.param_groups[0]["params"] == weights


def test_8_bit_adam_trains_much_as_adam_does_and_resumes_bit_for_bit(cache, tmp_path):
    """Its moments take a byte for each parameter, except in small tensors."""
    settings = {"use_8bit_adam": True, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3}
    whole = run_distill(cache, tmp_path / "whole", **settings)
    exact = run_distill(cache, tmp_path / "exact", **{**settings, "use_8bit_adam": False})
    for found, expected in zip(metrics(whole), metrics(exact), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert found["learning_rate"] == pytest.approx(expected["learning_rate"])
    out = run_distill(cache, tmp_path / "out", **settings, max_train_steps=2)
    state = torch.load(out / "checkpoints" / "step-0000002" / "state.pt", weights_only=True)
    moments = [each[name] for each in state["optimizer"]["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    quantised = [moment for moment in moments if hasattr(moment, "codes")]
    assert quantised
    assert all(moment.codes.dtype == torch.uint8 and moment.numel() >= 4096 for moment in quantised)
    run_distill(cache, out, **settings)
    expected, found = state_dict_of(whole / "unet"), state_dict_of(out / "unet")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_8_bit_adam_without_its_packages_is_refused(cache, tmp_path, monkeypatch):
    for package in ("bitsandbytes", "torchao.optim"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="needs the package torchao, or on a GPU bitsandbytes. Install it: pip install"):
        run_distill(cache, tmp_path / "out", use_8bit_adam=True)


def test_moments_of_another_packages_adam_are_refused():
    weights = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weights])
    optimizer.state[weights] = {"state1": torch.zeros(2), "state2": torch.zeros(2)}
    with pytest.raises(ValueError, match="exp_avg, exp_avg_sq is missing, as in a checkpoint of another package's"):
        check_moments(optimizer)


def test_a_checkpoint_with_another_memory_format_resumes_the_same(cache, plain, saved):
    """As one made on a GPU does on a CPU, where fused steps would mix up the numbers and say nothing."""
    path = saved / "checkpoints" / "step-0000002" / "state.pt"
    state = torch.load(path, weights_only=True)
    for moments in state["optimizer"]["state"].values():
        for name, value in moments.items():
            if value.ndim == 4:
                moments[name] = value.contiguous(memory_format=torch.channels_last)
    torch.save(state, path)
    run_distill(cache, saved, max_train_steps=4)
    expected, found = state_dict_of(plain / "unet"), state_dict_of(saved / "unet")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_tracker_logs_the_metrics(cache, tmp_path):
    """Read back by tensorboard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run_distill(cache, tmp_path / "out", report_to="tensorboard")
    (events,) = (out / "logs" / "distill-sd").glob("events.*")
    read = EventAccumulator(str(events.parent))
    read.Reload()
    for line in metrics(out):
        for name, value in line.items():
            if name != "step":
                (logged,) = [event.value for event in read.Scalars(name) if event.step == line["step"]]
                assert logged == pytest.approx(value, rel=1e-6), name


def test_a_tracker_that_is_not_installed_is_refused_before_training(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.training.accelerator.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report-to wandb needs the package wandb. Install it: pip install wandb"):
        run_distill(cache, tmp_path / "out", report_to="wandb")
    assert not (tmp_path / "out").exists()


def test_the_tracker_may_be_changed_between_two_runs(cache, tmp_path):
    out = run_distill(cache, tmp_path / "out", max_train_steps=1)
    run_distill(cache, out, max_train_steps=2, report_to="tensorboard")
    assert json.loads((out / "finished.json").read_text())["step"] == 2


@pytest.mark.parametrize("use_ema", [False, True])
def test_validation_images_do_not_change_the_training(cache, plain, tmp_path, use_ema):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n\na blue sky\n")
    plain = run_distill(cache, tmp_path / "plain", use_ema=True) if use_ema else plain
    out = run_distill(
        cache, tmp_path / "out", use_ema=use_ema, validation_prompts=prompts, validation_steps=2, max_train_steps=3
    )
    run_distill(cache, out, use_ema=use_ema, validation_prompts=prompts, validation_steps=2)
    drawn = {path.relative_to(out).as_posix() for path in (out / "validation").rglob("*.png")}
    assert drawn == {f"validation/step-000000{step}/000{i}.png" for step in (2, 4) for i in (0, 1)}
    about = json.loads((out / "validation" / "step-0000004" / "samples.json").read_text())
    assert about["prompts"] == ["a red cat", "a blue sky"]
    left, right = state_dict_of(plain / "unet"), state_dict_of(out / "unet")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_validation_images_are_those_of_the_saved_student(cache, tmp_path):
    """The last step's are what the finished pipeline draws, its averaged weights and all."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat")
    out = run_distill(cache, tmp_path / "out", use_ema=True, validation_prompts=prompts, validation_steps=4)
    pipe = DiffusionPipeline.from_pretrained(out)
    expected = generate(pipe, ["a red cat"], Sampler(), "again").images[0]
    drawn = Image.open(out / "validation" / "step-0000004" / "0000.png")
    np.testing.assert_allclose(np.asarray(drawn, float), np.asarray(expected, float), atol=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\n \n", "holds no prompts"), ("ein Häuschen".encode("latin-1"), "is not UTF-8")],
)
def test_prompts_that_cannot_be_read_are_refused(cache, tmp_path, content, message):
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content)
    with pytest.raises(UserError, match=message):
        run_distill(cache, tmp_path / "out", validation_prompts=prompts)


class Hub:
    """Stands in for huggingface_hub's HfApi; notes what it was asked."""

    def __init__(self, calls, refuse=()):
        self.calls, self.refuse = calls, refuse

    def create_repo(self, name, **options):
        self.calls.append(("create_repo", name))
        if "create_repo" in self.refuse:
            raise HFValidationError(f"no such place: {name}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **options):
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        self.calls.append(("upload_folder", repo_id, set(filter_repo_objects(files, ignore_patterns=ignore_patterns))))
        if "upload_folder" in self.refuse:
            raise OSError("the line is dead")
        return "https://hub/commit/1"


def test_the_student_goes_to_the_hub_without_what_belongs_to_the_training(cache, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("pipeline.models.hub.HfApi", lambda: Hub(calls))
    out = run_distill(cache, tmp_path / "out", push_to_hub="me/student", report_to="tensorboard")
    assert [call[:2] for call in calls] == [("create_repo", "me/student"), ("upload_folder", "me/student")]
    assert {"README.md", "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} <= calls[
        1
    ][2]
    assert not [file for file in calls[1][2] if file.startswith(("checkpoints", "logs"))]
    assert "uploaded to https://hub/commit/1" in capsys.readouterr().out
    assert json.loads((out / "finished.json").read_text())["step"] == 4


def test_a_hub_that_refuses_stops_the_run_before_training(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.models.hub.HfApi", lambda: Hub([], refuse=["create_repo"]))
    with pytest.raises(UserError, match="--push-to-hub me/student cannot be written .*log in with"):
        run_distill(cache, tmp_path / "out", push_to_hub="me/student")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_failed_upload_keeps_the_student_and_is_retried(cache, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("pipeline.models.hub.HfApi", lambda: Hub(calls, refuse=["upload_folder"]))
    with pytest.raises(UserError, match="is finished but was not uploaded .*Rerun the same command"):
        run_distill(cache, tmp_path / "out", push_to_hub="me/student", max_train_steps=1)
    weights = (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("pipeline.models.hub.HfApi", lambda: Hub(calls))
    run_distill(cache, tmp_path / "out", push_to_hub="me/student", max_train_steps=1)
    assert calls[-1][0] == "upload_folder"
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights


def test_what_is_no_student_of_the_caches_teacher_is_named_with_its_option(cache, tmp_path):
    with pytest.raises(UserError, match=r"vega is a student of SDXL, and --cache .* is of SD-1.x.*with --level\."):
        run_distill(cache, tmp_path / "out", level="vega")
    reset_accelerate()
    with pytest.raises(UserError, match="--init-from .*nothing is no folder of a student"):
        run_distill(cache, tmp_path / "out", init_from=tmp_path / "nothing")
    reset_accelerate()


@pytest.mark.parametrize("name", ["", "owner/name/more", "https://me:secret@hub/owner/name"])
def test_what_is_no_name_of_a_repository_is_refused_without_its_secrets(cache, tmp_path, name):
    with pytest.raises(UserError, match="is not the name of a repository. Give owner/name.") as caught:
        run_distill(cache, tmp_path / "out", push_to_hub=name)
    assert "secret" not in str(caught.value)


def test_a_disk_without_room_for_the_checkpoints_is_noticed_before_the_first_step(cache, tmp_path, monkeypatch):
    """A checkpoint is three times the weights, and one more is there than is kept."""
    (file,) = (cache / "students" / "sd_small").glob("*.safetensors")
    weights = 4 * sum(tensor.numel() for tensor in load_file(file).values())
    monkeypatch.setattr("pipeline.system.disk.free_bytes", lambda out: 9 * weights)
    with pytest.raises(UserError, match="out needs about .* more, but its disk has only .* --checkpoints-total-limit"):
        run_distill(cache, tmp_path / "out", checkpointing_steps=1, checkpoints_total_limit=2)
    assert not (tmp_path / "out" / "checkpoints").exists()
    run_distill(cache, tmp_path / "out", checkpointing_steps=1, checkpoints_total_limit=1)
