"""What accelerate's environment, the device and its software change: nothing that the settings say, or a refusal."""

import json

import pytest
import torch
from support.stages import metrics, run_distill, run_encode, run_teacher_cache, state_dict_of

from pipeline.distill import DistillSettings
from pipeline.encode import EncodeSettings
from pipeline.system.errors import UserError
from pipeline.teacher_cache import TeacherCacheSettings
from pipeline.training.accelerator import make_accelerator, refuse_precision


@pytest.fixture(scope="module")
def cache(cache_of_one_round):
    return cache_of_one_round


def spec(out):
    return json.loads((out / "spec.json").read_text())


@pytest.mark.parametrize("asked", ["4", "four"])
def test_accumulation_is_what_the_settings_say(cache, tmp_path, monkeypatch, asked, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", asked)
    out = run_distill(cache, tmp_path / "out", max_train_steps=2, train_batch_size=2)
    assert metrics(out)[-1]["epoch"] == pytest.approx(2 * 2 / 13)
    assert f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={asked} has no effect" in capsys.readouterr().out


def test_a_launcher_does_not_compile_the_student(cache, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("compiled")

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    monkeypatch.setattr(torch, "compile", refuse)
    run_distill(cache, tmp_path / "out", max_train_steps=1)


def test_precision_is_the_launchers_where_the_settings_say_none(cache, tmp_path, monkeypatch):
    asked = run_distill(cache, tmp_path / "asked", max_train_steps=2, mixed_precision="bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched = run_distill(cache, tmp_path / "launched", max_train_steps=2)
    assert spec(launched) == spec(asked)
    assert json.loads((launched / "distill.json").read_text())["mixed_precision"] == "bf16"
    left, right = state_dict_of(asked / "unet"), state_dict_of(launched / "unet")
    assert all(torch.equal(left[name], right[name]) for name in left)
    plain = run_distill(cache, tmp_path / "plain", max_train_steps=2, mixed_precision="no")
    assert spec(plain)["mixed_precision"] == "no"
    assert not torch.equal(state_dict_of(plain / "unet")["conv_in.weight"], left["conv_in.weight"])


def test_precision_is_full_by_default(cache, tmp_path):
    assert spec(run_distill(cache, tmp_path / "out", max_train_steps=1))["mixed_precision"] == "no"


def test_half_precision_on_a_cpu_is_refused(cache, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--mixed-precision fp16 needs a GPU. On a CPU, use bf16 or no."):
        run_distill(cache, tmp_path / "out", mixed_precision="fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="needs a GPU"):
        run_distill(cache, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_precision_that_training_does_not_know_is_refused(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="ACCELERATE_MIXED_PRECISION is fp8, which is not one of no, fp16, bf16"):
        run_distill(cache, tmp_path / "out")


def test_bf16_on_a_card_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(UserError, match="Tesla V100 does not have bf16. Use fp16 or no."):
        refuse_precision("bf16", "auto")
    refuse_precision("fp16", "auto")
    refuse_precision("bf16", "cpu")


@pytest.mark.parametrize(("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Mega")])
def test_a_launch_that_shares_networks_out_is_refused(
    teacher, images, latents, cache, tmp_path, monkeypatch, variable, name
):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    out = tmp_path / "out"
    for stage, inputs in [
        (run_encode, (teacher, images)),
        (run_teacher_cache, (teacher, latents)),
        (run_distill, (cache,)),
    ]:
        with pytest.raises(UserError, match=f"accelerate is set up for {name}.*--multi_gpu"):
            stage(*inputs, out)
    assert not out.exists()


def test_compiling_without_a_compiler_is_refused_before_the_first_step(cache, tmp_path):
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "g++"))}),
        pytest.raises(UserError, match="--compile needs a compiler .*leave --compile out"),
    ):
        run_distill(cache, tmp_path / "out", compile=True)
    assert not (tmp_path / "out").exists()


def test_what_torch_compile_finds_in_the_first_step_is_told_in_a_sentence(cache, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise OSError("Python.h: No such file or directory")

    class Compiled(torch.nn.Module):
        """A student whose first operation is compiled: tracing all of it takes long."""

        def __init__(self, student):
            super().__init__()
            self.student = student

        def forward(self, sample, *more, **named):
            return self.student(compile(torch.sin, backend=broken)(sample), *more, **named)

    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", Compiled)
    with pytest.raises(UserError, match="--compile failed .*Python.h.*leave --compile out"):
        run_distill(cache, tmp_path / "out", compile=True)


@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        (EncodeSettings, {"teacher": "demo", "data": "d", "out": "o"}),
        (TeacherCacheSettings, {"teacher": "demo", "latents": "l", "out": "o"}),
        (DistillSettings, {"cache": "c", "out": "o", "level": "sd_small"}),
    ],
)
def test_numbers_that_need_more_than_63_bits_are_refused(stage, needed):
    assert stage(**needed, seed=2**63 - 1).seed == 2**63 - 1
    for number in (2**63, 2**64):
        with pytest.raises(UserError, match=f"--seed is {number}; it must be at most {2**63 - 1}"):
            stage(**needed, seed=number)


def test_the_largest_seed_trains(cache, tmp_path):
    run_distill(cache, tmp_path / "out", seed=2**63 - 1, max_train_steps=1)


def test_the_device_of_the_settings_is_not_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    settings = DistillSettings(cache="c", out=tmp_path, level="sd_small", device="cpu", mixed_precision="no")
    with pytest.raises(UserError, match="--device cpu was asked for, but ACCELERATE_TORCH_DEVICE is meta"):
        make_accelerator(settings)
