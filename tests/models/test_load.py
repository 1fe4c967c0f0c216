"""What a pipeline must be like to be used, and what is said about one that is not."""

import json
import os
import pickle
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from support.stages import run_encode
from support.tiny import tiny_pipeline, tiny_unet

from pipeline.models.hashing import weights_sha256
from pipeline.models.load import find_pipeline, load_base, load_unet
from pipeline.models.schedule import load_noise_scheduler
from pipeline.system.errors import UserError

NETWORKS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture
def model(teacher, tmp_path):
    """A copy of the tiny teacher, to be changed."""
    return shutil.copytree(teacher, tmp_path / "model")


def change_json(path, **changes):
    """Set keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def refusal(act):
    with pytest.raises(UserError) as caught:
        act()
    return str(caught.value)


def load(folder):
    load_base(folder)
    load_unet(folder, None)


@pytest.mark.parametrize(
    ("path", "changes", "problem"),
    [
        ("unet/config.json", {"class_embed_type": "projection"}, "class_embed_type is 'projection'"),
        ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds is 1000"),
        ("unet/config.json", {"time_cond_proj_dim": 16}, "time_cond_proj_dim is 16"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type is 'image_proj'"),
        ("unet/config.json", {"in_channels": 9}, "in_channels of its U-Net are 9, but its VAE's latents have 4"),
        ("unet/config.json", {"out_channels": 8}, "out_channels of its U-Net are 8"),
        ("unet/config.json", {"_class_name": "UNetMotionModel"}, "its U-Net is a UNetMotionModel"),
        ("unet/config.json", {"cross_attention_dim": 12}, "have width 10, but its U-Net takes 12"),
        ("vae/config.json", {"scaling_factor": "0.18"}, "scaling_factor in its vae/config.json is '0.18'"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor in its vae/config.json is 0"),
        ("text_encoder/config.json", {"model_type": "bert"}, "its text encoder is a 'bert'"),
        ("text_encoder/config.json", {"vocab_size": 53}, "'<|endoftext|>' with number 53, but its text encoder knows"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 1}, "model_max_length is 1"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EDMEulerScheduler"},
            "is a EDMEulerScheduler",
        ),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "trained by flow matching"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps in"),
        ("scheduler/scheduler_config.json", {"beta_start": float("nan")}, "give no noise schedule"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
            "the scheduler in its model_index.json is a diffusers.FlowMatchEulerDiscreteScheduler, which has no "
            "schedule of betas, as flow matching and EDM have not. Use a teacher that was trained on one",
        ),
        (
            "model_index.json",
            {"scheduler": ["evil", "Evil"]},
            "is evil.Evil, which is not supported. Use one such as diffusers.DDIMScheduler.",
        ),
        (
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderTiny"]},
            "the vae in its model_index.json is diff",
        ),
        ("model_index.json", {"vae": ["evil", "Evil"]}, "the vae in its model_index.json is evil.Evil"),
        ("model_index.json", {"vae": [1, 2]}, "the vae in its model_index.json is [1, 2]"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "is transformers.T5EncoderModel"),
        ("model_index.json", {"_class_name": ["pipeline", "Evil"]}, "is a ['pipeline', 'Evil']"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline"),
        ("model_index.json", {"unet": [None, None]}, "it has no unet"),
    ],
)
def test_a_pipeline_that_would_be_misunderstood_is_refused_from_its_configs(model, path, changes, problem):
    change_json(model / path, **changes)
    for part in NETWORKS.values():
        (model / part).unlink()
    message = refusal(lambda: find_pipeline(str(model), None, None))
    assert problem in message
    assert str(model) in message


def test_an_inpainting_u_net_is_taken_where_it_need_not_denoise_latents(model):
    change_json(model / "unet/config.json", in_channels=9)
    assert find_pipeline(str(model), None, None, "--model", any_channels=True) == model


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", "[" * 100_000], ids=["empty", "list", "cut", "deep"])
@pytest.mark.parametrize("path", ["model_index.json", "unet/config.json", "vae/config.json"])
def test_a_broken_json_file_is_named(model, path, content):
    (model / path).write_text(content)
    assert refusal(lambda: find_pipeline(str(model), None, None)).startswith(f"{model / path} is corrupt")


@pytest.mark.parametrize("part", NETWORKS)
@pytest.mark.parametrize("how", ["missing", "renamed", "misshapen", "absent", "cut", "pickle"])
def test_a_network_is_never_filled_with_random_tensors(model, part, how):
    path = model / NETWORKS[part]
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("weight"))
    if how == "missing":
        del weights[name]
        save_file(weights, path)
    elif how == "renamed":
        save_file({f"model.{key}": tensor for key, tensor in weights.items()}, path)
    elif how == "misshapen":
        save_file({**weights, name: torch.zeros(3, 5)}, path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
        if how == "pickle":
            stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
            path.with_name(f"{stem}.bin").write_bytes(pickle.dumps(Trap()))
    message = refusal(lambda: load(model))
    assert str(path.parent) in message
    assert "\n" not in message
    if how in ("missing", "misshapen"):
        assert name in message


@pytest.mark.parametrize(
    ("part", "keys"),
    [("vae", ["sample_size"]), ("vae", ["layers_per_block", "norm_num_groups"]), ("unet", ["block_out_channels"])],
)
def test_numbers_of_a_config_that_are_null_are_named(model, part, keys):
    path = model / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(keys)))
    assert refusal(lambda: load(model)) == (
        f"{model / part} cannot be loaded: its config.json has null for {', '.join(keys)}. "
        "Write the numbers there, or copy it again."
    )


class Trap:
    """A pickle that would fail the test if it were executed."""

    def __reduce__(self):
        return pytest.fail, ("the pickle was executed",)


def test_no_code_of_a_pipeline_is_imported(model, monkeypatch):
    trap = "import pytest; pytest.fail('code of the pipeline was executed')"
    for path in ("pipeline.py", "vae/evil.py", "evil.py"):
        (model / path).write_text(trap)
    monkeypatch.chdir(model)
    monkeypatch.syspath_prepend(model)
    change_json(model / "model_index.json", vae=["evil", "Evil"])
    refusal(lambda: load(model))
    change_json(model / "model_index.json", vae=["diffusers", "AutoencoderKL"], custom_pipeline="pipeline")
    for part in ("text_encoder", "tokenizer"):
        name = "tokenizer_config.json" if part == "tokenizer" else "config.json"
        change_json(model / part / name, auto_map={"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})
    load(model)


def test_weights_of_the_only_variant_are_loaded_unasked(model):
    expected = weights_sha256(load_base(model).vae), weights_sha256(load_unet(model, None))
    for path in NETWORKS.values():
        file = model / path
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert (weights_sha256(load_base(model).vae), weights_sha256(load_unet(model, None))) == expected
    assert "has no weights of --variant ema. Use --variant fp16" in refusal(lambda: load_unet(model, "ema"))


def test_parts_without_the_variant_are_loaded_plain(model):
    file = model / NETWORKS["unet"]
    file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    load_base(model, "fp16")
    load_unet(model, "fp16")


@pytest.mark.parametrize("checker", ["without a feature extractor", "deleted"])
def test_a_safety_checker_is_neither_loaded_nor_needed(model, checker):
    change_json(
        model / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"] if checker == "deleted" else [None, None],
    )
    assert load_base(find_pipeline(str(model), None, None)).safety_checker is None


def test_the_longest_prompt_is_what_the_text_encoder_takes(model):
    """As long as the positions, if the tokenizer states no limit or a larger one."""
    for limit in (None, 77):
        change_json(model / "tokenizer/tokenizer_config.json", model_max_length=limit)
        assert load_base(find_pipeline(str(model), None, None)).tokenizer.model_max_length == 8


def test_a_download_of_half_precision_alone_is_found(model, monkeypatch):
    """The hub gives no weights without a variant where a repository has only those of fp16."""
    bare = shutil.copytree(model, model.with_name("bare"), ignore=shutil.ignore_patterns("*.safetensors"))
    folders = {None: bare, "fp16": model}
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, revision, variant: str(folders[variant]))
    assert find_pipeline("someone/model", None, None) == model


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (ConnectionError("[Errno 111] Connection refused"), "the hub cannot be reached."),
        (HTTPError("[Errno -2] Name or service not known"), "the hub cannot be reached."),
        (OfflineModeIsEnabled("an essay"), "no hub can be asked, because HF_HUB_OFFLINE is set."),
        (ValueError("no such variant.\nAn essay"), "it cannot be downloaded from a hub: no such variant."),
    ],
)
def test_a_failed_download_states_the_cause_in_a_sentence(monkeypatch, cause, message):
    def download(name, revision, variant):
        raise OSError("Check out the root cause in the stacktrace above.") from cause

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert refusal(lambda: find_pipeline("someone/model", None, None)) == (
        f"--teacher someone/model is not a folder, and {message}"
    )


def test_a_mistyped_name_is_answered_with_a_similar_one(tmp_path, monkeypatch):
    def download(name, revision, variant):
        raise ConnectionError

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "studnets").touch()
    assert refusal(lambda: find_pipeline("demoo", None, None)).endswith("cannot be reached. Did you mean demo?")
    for name in ("studnet", "./studnet", f"{tmp_path}/studnet"):
        assert refusal(lambda name=name: find_pipeline(name, None, None)).endswith(" Did you mean student?")


def test_an_output_that_is_no_model_is_called_what_it_is(tmp_path):
    spec = {"seed": 0, "learning_rate": 1e-5}
    (tmp_path / "spec.json").write_text(json.dumps({**spec, "cache": "0"}))
    unfinished = f"--model {tmp_path} is the output of a `%s` that is not finished. Rerun that command to finish it."
    assert refusal(lambda: find_pipeline(str(tmp_path), None, None, "--model")) == unfinished % "distill"
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert refusal(lambda: find_pipeline(str(tmp_path), None, None, "--model")) == unfinished % "finetune"
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert refusal(lambda: find_pipeline(str(tmp_path), None, None, "--model")) == (
        f"--model {tmp_path} holds LoRA weights, not a model. Give the model that they were trained on."
    )


def test_latents_are_no_model(teacher, images, tmp_path):
    latents = run_encode(teacher, images, tmp_path / "latents")
    assert refusal(lambda: find_pipeline(str(latents), None, None)) == (
        f"--teacher {latents} is the output of `encode`, not a model. Use a checkpoint in diffusers layout."
    )


def test_a_folder_that_holds_a_single_file_leads_to_it(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert refusal(lambda: find_pipeline(str(tmp_path), None, None)) == (
        f"--teacher {tmp_path} has no model_index.json. "
        f"To use the single file in it, give --teacher {tmp_path / 'model.safetensors'}."
    )


@pytest.mark.parametrize(
    "path", ["model_index.json", "unet/config.json", "README.md", "tokenizer/vocab.json", NETWORKS["vae"]]
)
def test_a_file_that_could_be_waited_for_is_named(model, path):
    """Of the libraries' files as well: they would open it."""
    (model / path).unlink(missing_ok=True)
    os.mkfifo(model / path)
    if path == "model_index.json":
        assert "has no model_index.json" in refusal(lambda: find_pipeline(str(model), None, None))
    else:
        assert f"{path} is not a regular file. Copy it again" in refusal(lambda: find_pipeline(str(model), None, None))


def test_keys_that_a_config_leaves_out_have_the_defaults_of_its_own_class(model):
    path = model / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "LCMScheduler"}))
    expected = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert torch.equal(load_noise_scheduler(model, None).alphas_cumprod, expected)


def test_a_prediction_type_that_cannot_be_trained_is_refused(model):
    change_json(model / "scheduler/scheduler_config.json", prediction_type="sample")
    assert "prediction type 'sample'" in refusal(lambda: load_noise_scheduler(model, None))
    assert load_noise_scheduler(model, "epsilon").config.prediction_type == "epsilon"


@pytest.mark.parametrize("kind", ["AsymmetricAutoencoderKL"])
def test_the_vae_has_the_class_that_the_index_names(tmp_path, kind):
    import diffusers

    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    vae = getattr(diffusers, kind)(
        down_block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    shutil.rmtree(tmp_path / "vae")
    vae.save_pretrained(tmp_path / "vae")
    change_json(tmp_path / "model_index.json", vae=["diffusers", kind])
    found = load_base(find_pipeline(str(tmp_path), None, None)).vae
    assert weights_sha256(found) == weights_sha256(vae)


def test_prompt_embeddings_may_be_projected_in_the_u_net(tmp_path):
    pipe = tiny_pipeline()
    pipe.unet = tiny_unet(cross_attention_dim=12, encoder_hid_dim=10, encoder_hid_dim_type="text_proj")
    pipe.save_pretrained(tmp_path)
    assert find_pipeline(str(tmp_path), None, None) == tmp_path
