"""Training for integers: the student that rounds is trained, stopped, resumed, saved and exported."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from support.stages import reset_accelerate, run_distill, tree

from pipeline.commands import distill, export, finetune
from pipeline.distill import DistillSettings
from pipeline.evaluation.model_card import integers_text
from pipeline.evaluation.pair import load_named_pipeline
from pipeline.models import fake_quant
from pipeline.models.fake_quant import QUANTISERS, state_of_quantisers
from pipeline.models.families import family_of_spec
from pipeline.models.load import load_deployed_unet, load_unet
from pipeline.sampling.process import PipelineRef, load_pipeline
from pipeline.settings.export import ExportSettings
from pipeline.settings.finetune import FinetuneSettings
from pipeline.system.errors import UserError
from pipeline.training import qat
from pipeline.training.accelerator import make_accelerator
from pipeline.training.loader import batches

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def modelopt():
    pytest.importorskip("modelopt")


def test_lora_is_refused(tmp_path):
    with pytest.raises(UserError, match="--qat int8 trains the whole U-Net, and --lora-rank does not"):
        FinetuneSettings(model="demo", latents=tmp_path, out=tmp_path / "out", qat="int8", lora_rank=2)


def test_compiling_is_refused(tmp_path):
    with pytest.raises(UserError, match="--compile does not work with --qat w4a8"):
        DistillSettings(cache=tmp_path, out=tmp_path / "out", level="sd_small", qat="w4a8", compile=True)


def test_a_format_is_one_of_those_that_there_are(tmp_path):
    with pytest.raises(UserError, match="--qat 'int4' is not one of int8, w4a8"):
        DistillSettings(cache=tmp_path, out=tmp_path / "out", level="sd_small", qat="int4")


def test_without_modelopt_no_training_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(fake_quant, "find_spec", lambda name: None)
    settings = DistillSettings(cache=tmp_path, out=tmp_path / "out", level="sd_small", qat="int8", device="cpu")
    with pytest.raises(UserError, match=r"--qat int8 needs nvidia-modelopt\. Run: pip install"):
        make_accelerator(settings)


def test_a_card_says_what_integers_the_student_is_for():
    assert integers_text(None) == ""
    assert "weights of 4 bits" in integers_text("w4a8")
    assert "unet/qat.json" in integers_text("int8")


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_each_process_measures_ranges_on_the_first_entries_of_the_training(rank, size, cache, tmp_path, monkeypatch):
    """64 of them in batches of 24, whatever the process, as the first process of one would train on them."""
    settings = DistillSettings(cache=cache, out=tmp_path, level="sd_small", qat="int8", train_batch_size=24)
    dataset = distill.open_cache(settings)
    accelerator = SimpleNamespace(
        device=CPU, is_main_process=False, autocast=nullcontext, process_index=rank, num_processes=size
    )
    seen = []
    monkeypatch.setattr(qat, "denoise", lambda unet, noisy, *_: seen.append(noisy))
    read = lambda these, where: batches(these, dataset, where, 0)  # noqa: E731
    scheduler = DDPMScheduler.from_config(dataset.spec["noise_scheduler"])
    transform = qat.qat_of(settings, accelerator, family_of_spec(dataset.spec), scheduler, read)
    transform.try_out(torch.nn.Identity())
    plain = dataclasses.replace(settings, dataloader_num_workers=0)
    stream = batches(plain, dataset, SimpleNamespace(device=CPU, process_index=0, num_processes=1), 0)
    expected = [next(stream) for _ in range(3)]
    stream.close()
    assert len(seen) == 3
    for noisy, batch in zip(seen, expected, strict=True):
        assert torch.equal(noisy, qat.add_noise(batch.latents, batch.noise, batch.timesteps, scheduler.alphas_cumprod))


def weights_of(out):
    return load_file(out / "unet" / WEIGHTS)


@pytest.fixture(scope="module", params=["int8", "w4a8"])
def trained(request, cache, latents, tmp_path_factory):
    """A student of four steps with an average."""
    pytest.importorskip("modelopt")
    place = tmp_path_factory.mktemp("qat")
    return request.param, run_distill(cache, place / "out", qat=request.param, use_ema=True, checkpointing_steps=2)


def test_a_stopped_training_ends_as_if_it_had_not_been_stopped(trained, cache, tmp_path, monkeypatch):
    """It takes up the ranges of its checkpoint, and measures none."""
    format, straight = trained
    settings = {"qat": format, "use_ema": True, "checkpointing_steps": 2}
    out = run_distill(cache, tmp_path / "out", **settings, max_train_steps=2)
    monkeypatch.setattr(qat, "denoise", lambda *_: pytest.fail("the ranges were measured again"))
    run_distill(cache, tmp_path / "out", **settings)
    assert tree(out / "unet") == tree(straight / "unet")


def test_plain_programs_load_its_weights_as_floats(trained, cache):
    _, out = trained
    plain = UNet2DConditionModel.from_pretrained(out / "unet")
    weights = weights_of(out)
    assert plain.state_dict().keys() == weights.keys()
    before = load_file(cache / "students" / "sd_small" / WEIGHTS)
    assert all(not torch.equal(weights[name], before[name]) for name in weights if name.endswith("conv1.weight"))
    assert state_of_quantisers(load_unet(out, None)) == {}


def test_generating_and_evaluating_use_the_student_that_rounds(trained):
    format, out = trained
    generating = load_pipeline(PipelineRef(out, out / "unet", CPU, torch.float32)).unet
    evaluated = load_named_pipeline(str(out), "--student", None, None, CPU, torch.float32)
    for unet in (generating, evaluated.pipe.unet):
        assert state_of_quantisers(unet)["qat"] == format
    assert "quantisers" in evaluated.spec
    assert f"| qat | {format} |" in (out / "README.md").read_text()


def test_what_is_trained_and_validated_is_the_student_that_rounds(modelopt, cache, tmp_path):
    settings = DistillSettings(cache=cache, out=tmp_path, level="sd_small", qat="w4a8", device="cpu")
    training = distill.prepare(settings, distill.open_cache(settings), Accelerator(cpu=True))
    reset_accelerate()
    assert state_of_quantisers(training.student)["qat"] == "w4a8"
    assert training.student is training.model
    assert all(layer.input_quantizer.is_enabled for layer in fake_quant.quantised_layers(training.model).values())


def test_its_graph_holds_integers_and_computes_as_torch_does(trained, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    format, out = trained
    export.run(ExportSettings(model=str(out), format="onnx", out=tmp_path / "onnx"))
    graph = onnx.load(tmp_path / "onnx" / "unet" / "model.onnx").graph
    kinds = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer if len(tensor.dims) > 1}
    assert ("INT8" if format == "int8" else "INT4") in kinds
    unet = load_deployed_unet(out / "unet", None, torch.float32).eval()
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == len(state_of_quantisers(unet)["ranges"])
    draw = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16, generator=draw), torch.randn(2, 7, 10, generator=draw)
    with torch.no_grad():
        expected = unet(sample, 601, text).sample
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "unet" / "model.onnx")
    named = {"sample": sample, "timestep": torch.tensor(601.0), "encoder_hidden_states": text}
    found = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in named.items()})[0])
    # A value between two integers may go to the other one, and those after it follow.
    assert (found - expected).square().mean() < 0.01 * expected.square().mean()


def test_a_graph_in_half_precision_is_refused(trained, tmp_path):
    _, out = trained
    with pytest.raises(UserError, match="--dtype fp16: .* was trained for integers"):
        export.run(ExportSettings(model=str(out), format="onnx", out=tmp_path / "onnx", dtype="fp16"))


def test_another_training_starts_from_the_floats(trained, cache, tmp_path):
    _, out = trained
    further = run_distill(cache, tmp_path / "further", init_from=out, max_train_steps=1)
    assert not (further / "unet" / QUANTISERS).exists()


def test_a_model_is_finetuned_for_integers(modelopt, teacher, latents, tmp_path):
    settings = FinetuneSettings(
        model=str(teacher),
        latents=latents,
        out=tmp_path / "out",
        qat="int8",
        max_train_steps=1,
        train_batch_size=2,
        dataloader_num_workers=0,
        device="cpu",
        report=False,
    )
    finetune.run(settings)
    reset_accelerate()
    assert state_of_quantisers(load_deployed_unet(tmp_path / "out" / "unet", None, torch.float32))["qat"] == "int8"
    assert "trained for integers" in (tmp_path / "out" / "README.md").read_text()
