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
from support.edited import change_json
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
        ("unet/config.json", {"dual_cross_attention": True}, "dual_cross_attention is True"),
        ("unet/config.json", {"sample_size": -1}, "sample_size in its unet/config.json is -1, not a positive integer"),
        ("unet/config.json", {"sample_size": "16"}, "sample_size in its unet/config.json is '16', not a positive"),
        ("unet/config.json", {"sample_size": True}, "sample_size in its unet/config.json is True, not a positive"),
        ("unet/config.json", {"sample_size": [16, 16, 16]}, "is [16, 16, 16], not a positive integer"),
        (
            "unet/config.json",
            {"sample_size": 17},
            "sample_size in its unet/config.json is 17, which makes images of 34",
        ),
        ("unet/config.json", {"sample_size": [16, 18]}, "is [16, 18], which makes images of 32 x 36 pixels"),
        ("unet/config.json", {"sample_size": 100000}, "images of 200000 pixels. Correct it: the sides of images must"),
        ("vae/config.json", {"scaling_factor": True}, "scaling_factor in its vae/config.json is True"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor in its vae/config.json is 0.1, which SD has not"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "the latents_mean in its vae/config.json is [0, 0, 0, 0]"),
        ("vae/config.json", {"latents_std": [1, 1, 1, 1]}, "the latents_std in its vae/config.json is [1, 1, 1, 1]"),
        ("vae/config.json", {"block_out_channels": 8}, "block_out_channels in its vae/config.json is 8, not a list"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "77"}, "model_max_length is '77', not an integer"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 7.5}, "model_max_length is 7.5, not an integer"),
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
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "is a StableDiffusion3Pipeline"),
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


@pytest.mark.parametrize("token", ["bos_token", "eos_token", "pad_token"])
def test_a_tokenizer_without_a_token_that_prompts_need_is_refused(model, token):
    path = model / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {token: None}))
    message = refusal(lambda: find_pipeline(str(model), None, None))
    assert message == f"--teacher {model}: {path} has null for {token}. Name the token there, as CLIP's does."


@pytest.mark.parametrize("size", [16, [16, 20], None])
def test_a_size_that_images_can_have_is_taken(model, size):
    path = model / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
    assert find_pipeline(str(model), None, None) == model


def test_without_a_size_of_the_u_nets_that_of_the_vae_counts(model):
    path = model / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": None}))
    change_json(model / "vae/config.json", sample_size=36)
    assert "the sample_size in its vae/config.json is 36, which makes images of 36 pixels" in refusal(
        lambda: find_pipeline(str(model), None, None)
    )


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


@pytest.mark.parametrize("part", NETWORKS)
def test_weights_that_the_config_has_no_place_for_are_refused(model, part):
    path = model / NETWORKS[part]
    save_file({**load_file(path), "extra.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    message = refusal(lambda: load(model))
    assert message == (
        f"{path} holds extra.weight, which its config.json has no place for. "
        "Correct the config, or copy or download the pipeline again."
    )


def test_a_layer_that_the_config_leaves_out_is_not_lost(model):
    path = model / NETWORKS["text_encoder"]
    layer = {name: tensor for name, tensor in load_file(path).items() if "layers.0." in name}
    more = {name.replace("layers.0.", "layers.1."): tensor for name, tensor in layer.items()}
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    message = refusal(lambda: load(model))
    assert message.startswith(
        f"{path} holds encoder.layers.1.layer_norm1.bias and {len(more) - 1} other tensors, which"
    )


@pytest.mark.parametrize(
    "name",
    [
        "text_model.embeddings.position_ids",
        "embeddings.position_ids",
        "vision_model.embeddings.class_embedding",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
    ],
)
def test_what_checkpoints_hold_of_clip_besides_its_text_encoder_is_left_aside(model, name):
    expected = weights_sha256(load_base(model).text_encoder)
    path = model / NETWORKS["text_encoder"]
    save_file({**load_file(path), name: torch.zeros(2)}, path, metadata={"format": "pt"})
    assert weights_sha256(load_base(model).text_encoder) == expected


def test_the_attention_of_a_vae_may_have_its_names_of_old(model):
    expected, path = weights_sha256(load_base(model).vae), model / NETWORKS["vae"]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in weights.items()}
    assert "decoder.mid_block.attentions.0.query.weight" in weights
    save_file(weights, path, metadata={"format": "pt"})
    assert weights_sha256(load_base(model).vae) == expected


def in_pieces(path, count, keep=False):
    """Split a weight file into pieces with an index; `keep` leaves the plain file."""
    weights, stem = load_file(path), path.name.removesuffix(".safetensors")
    names = {name: f"{stem}-{1 + i % count:05d}-of-{count:05d}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(names.values()):
        piece = {name: tensor.clone() for name, tensor in weights.items() if names[name] == file}
        save_file(piece, path.with_name(file), metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    if not keep:
        path.unlink()


@pytest.mark.parametrize("part", NETWORKS)
def test_one_set_of_weights_is_loaded_and_two_are_refused(model, part):
    expected, path = weights_sha256(load_base(model).vae), model / NETWORKS[part]
    stem = path.name.removesuffix(".safetensors")
    plain = path.read_bytes()
    in_pieces(path, 2)
    load(model)
    path.write_bytes(plain)
    message = refusal(lambda: load(model))
    assert f"{path.parent} holds 2 sets of weights: " in message
    assert f"{stem}-00001-of-00002.safetensors, {stem}-00002-of-00002.safetensors" in message
    assert f", {path.name}" in message
    for piece in path.parent.glob("*-of-*"):
        piece.unlink()
    # The libraries would still look for the pieces.
    assert f"holds 2 sets of weights: {path.name}, {path.name}.index.json. Delete" in refusal(lambda: load(model))
    path.with_name(f"{path.name}.index.json").unlink()
    load(model)
    assert weights_sha256(load_base(model).vae) == expected


def test_pieces_of_two_sets_and_missing_pieces_are_refused(model):
    path = model / NETWORKS["vae"]
    in_pieces(path, 3, keep=True)
    in_pieces(path, 2)
    assert "holds 2 sets of weights: diffusion_pytorch_model-00001-of-00002.safetensors" in refusal(lambda: load(model))
    for piece in path.parent.glob("*-of-00003*"):
        piece.unlink()
    load(model)
    next(path.parent.glob("*-00001-of-00002*")).unlink()
    assert "holds 1 of 2 pieces of its weights: diffusion_pytorch_model-00002-of" in refusal(lambda: load(model))


def test_a_variant_beside_plain_weights_is_no_second_set(model):
    path = model / NETWORKS["vae"]
    half = {name: tensor.half() for name, tensor in load_file(path).items()}
    variant = path.with_name("diffusion_pytorch_model.fp16.safetensors")
    save_file(half, variant, metadata={"format": "pt"})
    in_pieces(path, 2)
    assert load_base(model).vae.dtype == torch.float32
    assert torch.equal(load_base(model, "fp16").vae.quant_conv.weight, half["quant_conv.weight"].float())


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
