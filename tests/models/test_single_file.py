"""A checkpoint in one file is read like a folder: its kind is found out, and each tensor is the file's own."""

import gzip
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.few_merges import FEW, MERGES, text_config, write_few
from support.remembered import remembered
from support.stages import pruned_pipeline, reset_accelerate, run_encode, run_teacher_cache, shard_files
from support.tiny import tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipeline.cli import main
from pipeline.models import single_file, tokenizer
from pipeline.models.families import sd_configs
from pipeline.models.families.sd import LEVELS
from pipeline.models.families.sd_single_file import pipeline_weights
from pipeline.models.load import find_pipeline, load_base, load_unet
from pipeline.system.errors import UserError
from shards.manifest import read_manifest
from shards.store import open_store

PARTS = ("unet", "vae", "text_encoder")
UNET_SHAPES = remembered(sd_configs._unet_shapes)


def with_clip_tokens(pipe, merges=FEW, **changes):
    """The pipeline with a text encoder for the tokens of the first of CLIP's merges."""
    config = {**pipe.text_encoder.config.to_dict(), **text_config(merges), **changes}
    torch.manual_seed(4)
    pipe.register_modules(text_encoder=CLIPTextModel(CLIPTextConfig(**config)).eval())
    return pipe


@pytest.fixture(scope="module")
def few_merges(tmp_path_factory):
    return write_few(tmp_path_factory.mktemp("merges"))


@pytest.fixture(scope="module")
def small_versions():
    return versions_with(FEW)


def versions_with(merges):
    """Two versions of the tiny pipeline's shape."""
    versions = []
    for version, act in zip(sd_configs.VERSIONS, ("quick_gelu", "gelu"), strict=True):
        pipe = with_clip_tokens(tiny_pipeline(), merges, hidden_act=act)
        configs = dict(version.configs)
        configs["unet/config.json"] = {k: v for k, v in dict(pipe.unet.config).items() if k != "_name_or_path"}
        configs["vae/config.json"] = dict(pipe.vae.config)
        configs["text_encoder/config.json"] = pipe.text_encoder.config.to_dict()
        versions.append(replace(version, configs=configs))
    return tuple(versions)


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch, small_versions, few_merges):
    """These versions and merges, and a cache of this test's own."""
    monkeypatch.setattr(sd_configs, "_unet_shapes", UNET_SHAPES)
    monkeypatch.setattr(sd_configs, "VERSIONS", small_versions)
    monkeypatch.setattr(tokenizer, "MERGES", few_merges)
    monkeypatch.setattr(single_file, "CONVERTED", tmp_path / "converted")


def write(pipe, file, dtype=torch.float32, metadata=None, **more):
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in pipeline_weights(pipe).items()}
    save_file({**tensors, **more}, file, metadata)
    return file


def found(file):
    folder = find_pipeline(str(file), None, None)
    return folder, load_base(folder, None, load_unet(folder, None))


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_every_kind_is_found_out_and_has_the_files_weights(tmp_path, level, capsys):
    pipe = with_clip_tokens(pruned_pipeline(level) if level else tiny_pipeline())
    folder, read = found(write(pipe, tmp_path / "x.safetensors"))
    shape = {"bk_base": "sd_small", "bk_tiny": "sd_tiny"}.get(level, level)
    said = capsys.readouterr().err
    assert (f"SD-1.x, a student of the shape of {shape}" if level else "(SD-1.x)") in said
    for part in PARTS:
        expected = getattr(pipe, part).state_dict()
        for name, tensor in getattr(read, part).state_dict().items():
            assert torch.equal(tensor, expected[name]), f"{part}.{name}"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert found(tmp_path / "x.safetensors")[0] == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.fixture
def all_merges(monkeypatch):
    """Versions with all of CLIP's tokens; returns how many merges they have."""
    monkeypatch.setattr(tokenizer, "MERGES", MERGES)
    count = len(gzip.decompress(MERGES.read_bytes()).splitlines())
    monkeypatch.setattr(sd_configs, "VERSIONS", versions_with(count))
    return count


def test_open_clip_makes_it_sd_2_and_v_prediction(tmp_path, all_merges):
    """With all of CLIP's tokens."""
    pipe = with_clip_tokens(tiny_pipeline(), all_merges, hidden_act="gelu", num_hidden_layers=1)
    folder, read = found(write(pipe, tmp_path / "x.safetensors"))
    assert read.scheduler.config.prediction_type == "v_prediction"
    assert read.tokenizer.pad_token == "!"
    expected = pipe.text_encoder.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in read.text_encoder.state_dict().items())


@pytest.mark.parametrize(
    ("metadata", "more", "expected"),
    [
        ({}, {}, ("epsilon", False)),
        ({"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}, {}, ("v_prediction", True)),
        ({"modelspec.prediction_type": "epsilon"}, {}, ("epsilon", False)),
        ({}, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, ("v_prediction", True)),
    ],
)
def test_the_schedule_is_what_the_file_states(tmp_path, metadata, more, expected):
    folder, read = found(
        write(with_clip_tokens(tiny_pipeline()), tmp_path / "x.safetensors", metadata=metadata, **more)
    )
    config = read.scheduler.config
    assert (config.prediction_type, bool(config.get("rescale_betas_zero_snr"))) == expected


def test_half_precision_stays_half_and_a_mixture_becomes_full(tmp_path):
    pipe = with_clip_tokens(tiny_pipeline())
    folder, _ = found(write(pipe, tmp_path / "half.safetensors", torch.float16))
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert {t.dtype for t in load_file(folder / unet).values()} == {torch.float16}
    whole = load_file(write(pipe, tmp_path / "x.safetensors"))
    mixed = {name: t.half() if name.startswith("model.diffusion_model.") else t for name, t in whole.items()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    folder, read = found(tmp_path / "mixed.safetensors")
    assert {t.dtype for t in load_file(folder / unet).values()} == {torch.float32}
    assert torch.equal(read.unet.conv_in.weight, pipe.unet.conv_in.weight.half().float())


def test_a_pickle_is_read_and_one_with_code_is_not_run(tmp_path):
    pipe = with_clip_tokens(tiny_pipeline())
    torch.save({"state_dict": pipeline_weights(pipe), "global_step": 7}, tmp_path / "x.ckpt")
    assert torch.equal(found(tmp_path / "x.ckpt")[1].unet.conv_in.weight, pipe.unet.conv_in.weight)

    torch.save({"state_dict": pipeline_weights(pipe), "bad": Touching(tmp_path / "touched")}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=r"bad.ckpt cannot be read.*use a .safetensors file: code in a pickle"):
        find_pipeline(str(tmp_path / "bad.ckpt"), None, None)
    assert not (tmp_path / "touched").exists()


class Touching:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def without(prefix):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(prefix)}


VAE_CONV = "first_stage_model.decoder.conv_in.bias"
REFUSED = {
    "holds no VAE. Use a checkpoint with all its parts": without("first_stage_model."),
    "holds no text encoder. Use a checkpoint with all its parts": without("cond_stage_model."),
    "is a checkpoint of SD3. Use one of SD-1.x or SD-2.x or SDXL": lambda t: {
        **t,
        "model.diffusion_model.joint_blocks.0.x": torch.zeros(1),
    },
    "is a LoRA": lambda t: {"lora_unet_down_blocks_0.alpha": torch.zeros(1)},
    "is not a checkpoint of Stable Diffusion": lambda t: {"something": torch.zeros(1)},
    "takes 9 input channels, as inpainting models do": lambda t: {
        **t,
        sd_configs.CONV_IN: torch.zeros(8, 9, 3, 3),
    },
    "has the shape of neither SD-1.x nor one of its students": without("model.diffusion_model.middle_block.2."),
    "cannot be converted by diffusers": lambda t: {**t, VAE_CONV: torch.zeros(5)},
    "lacks first_stage_model.decoder.conv_in.bias": without("first_stage_model.decoder.conv_in.bias"),
    "lacks cond_stage_model.transformer.text_model.final_layer_norm.bias": without(
        "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_complete_checkpoint_is_refused_with_the_reason(tmp_path, message):
    tensors = load_file(write(with_clip_tokens(tiny_pipeline()), tmp_path / "x.safetensors"))
    save_file(REFUSED[message](tensors), tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=message):
        find_pipeline(str(tmp_path / "bad.safetensors"), None, None)
    assert not [path for path in (tmp_path / "converted").iterdir() if path.is_dir()]


def test_a_truncated_file_is_refused(tmp_path):
    file = write(with_clip_tokens(tiny_pipeline()), tmp_path / "x.safetensors")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"x.safetensors cannot be read as a checkpoint .*Download it again\.$"):
        find_pipeline(str(file), None, None)


@pytest.mark.parametrize("name", ["x.ckpt", "x.bin", "notes.txt"])
def test_another_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("not a checkpoint")
    with pytest.raises(UserError, match=f"{name} (cannot be read as a checkpoint|is a file, but not a checkpoint)"):
        find_pipeline(str(tmp_path / name), None, None)


def test_the_stages_write_what_they_write_from_the_folder(tmp_path, images):
    pipe = with_clip_tokens(tiny_pipeline())
    file = write(pipe, tmp_path / "x.safetensors")
    folder = find_pipeline(str(file), None, None)
    from_file = run_encode(file, images, tmp_path / "from-file")
    assert shard_files(from_file) == shard_files(run_encode(folder, images, tmp_path / "from-folder"))
    arguments = ["sample", "--model", file, "--prompts", "a", "--out", tmp_path / "samples", "--num-inference-steps", 1]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    reset_accelerate()
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("all_merges")
def test_the_tokens_are_those_of_clip(tmp_path):
    """Numbers that are known from CLIP's vocabulary, and a text with what it has no merges for."""
    tokenizer.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(sd_configs.TOKENIZER_CONFIG))
    clip = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(clip) == sd_configs.TEXT_CONFIG["vocab_size"]
    assert clip("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    text = "naïve café 日本 🚀!"
    assert clip.decode(clip(text, add_special_tokens=False).input_ids).replace(" ", "") == text.replace(" ", "")


def test_a_file_and_the_folder_it_was_made_from_are_the_same_teacher(tmp_path, images):
    pipe = with_clip_tokens(tiny_pipeline())
    file, folder = write(pipe, tmp_path / "x.safetensors"), tmp_path / "folder"
    pipe.register_modules(tokenizer=found(file)[1].tokenizer)
    pipe.save_pretrained(folder)
    specs = []
    for name, teacher in (("a", file), ("b", folder)):
        latents = run_encode(teacher, images, tmp_path / f"latents-{name}")
        cache = run_teacher_cache(teacher, latents, tmp_path / f"cache-{name}", rounds=1)
        specs.append(read_manifest(open_store(cache)).spec)
    fields = ("latents", "teacher_sha256", "teacher_config")
    assert [specs[0][name] for name in fields] == [specs[1][name] for name in fields]
    run_teacher_cache(file, tmp_path / "latents-b", tmp_path / "cache", rounds=1)
