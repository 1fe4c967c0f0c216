"""A teacher whose configs or tokenizer were edited is another one, and what was begun with the first says so."""

import json
import shutil

import pytest
from support.damage import verify
from support.edited import change_json, swap_tokens
from support.stages import reset_accelerate, run_encode, run_teacher_cache, tree

from pipeline.commands import encode, evaluate, finetune, teacher_cache
from pipeline.commands.finetune import FinetuneSettings
from pipeline.encode import EncodeSettings
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.system.errors import UserError
from pipeline.teacher_cache import TeacherCacheSettings
from shards.schema import ShardError

EDITS = {
    "VAE than the one of --teacher": lambda t: change_json(t / "vae/config.json", act_fn="relu"),
    "VAE than .* differ in scaling_factor": lambda t: change_json(t / "vae/config.json", scaling_factor=1.0),
    "text encoder than .* differ in hidden_act": lambda t: change_json(
        t / "text_encoder/config.json", hidden_act="gelu"
    ),
    "text encoder than .* in num_attention_heads": lambda t: change_json(
        t / "text_encoder/config.json", num_attention_heads=1
    ),
    "tokenizer than": lambda t: swap_tokens(t / "tokenizer"),
}


@pytest.fixture
def model(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / "model")


@pytest.mark.parametrize("message", EDITS)
def test_latents_are_refused_by_every_command_that_uses_them(model, images, tmp_path, message):
    latents = run_encode(model, images, tmp_path / "latents")
    EDITS[message](model)
    with pytest.raises(UserError, match=f"{latents} was encoded with another {message}"):
        run_teacher_cache(model, latents, tmp_path / "cache")
    reset_accelerate()
    settings = TeacherCacheSettings(teacher=str(model), latents=latents, out=tmp_path / "cache", device="cpu")
    with pytest.raises(UserError, match=message):
        teacher_cache.plan(settings)
    of_model = message.replace("--teacher", "--model")
    with pytest.raises(UserError, match=of_model):
        finetune.plan(FinetuneSettings(model=str(model), latents=latents, out=tmp_path / "tuned", device="cpu"))
    both = {"teacher": str(model), "student": str(model), "latents": latents}
    with pytest.raises(UserError, match=message):
        evaluate.plan(EvaluateSettings(**both, out=tmp_path / "evaluation", device="cpu"))


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda t: change_json(t / "vae/config.json", act_fn="relu"), "configs.vae.act_fn"),
        (lambda t: change_json(t / "text_encoder/config.json", hidden_act="gelu"), "configs.text_encoder.hidden_act"),
        (lambda t: swap_tokens(t / "tokenizer"), "tokenizer_sha256"),
    ],
)
def test_latents_are_not_gone_on_with(model, images, tmp_path, edit, field):
    latents = run_encode(model, images, tmp_path / "latents", shard_range="0:1")
    before = tree(latents)
    edit(model)
    settings = {"teacher": str(model), "data": str(images), "resolution": 32, "entries_per_shard": 5, "device": "cpu"}
    with pytest.raises(ShardError, match=rf"{field}: .* -> "):
        run_encode(model, images, latents)
    reset_accelerate()
    with pytest.raises(ShardError, match=field):
        encode.plan(EncodeSettings(out=latents, **settings))
    assert tree(latents) == before


def test_a_cache_is_neither_gone_on_with_nor_recomputed(model, images, tmp_path):
    latents = run_encode(model, images, tmp_path / "latents")
    cache = run_teacher_cache(model, latents, tmp_path / "cache", shard_range="0:2")
    before = tree(cache)
    change_json(model / "unet/config.json", act_fn="relu")
    with pytest.raises(ShardError, match=r'teacher_config\.act_fn: null -> "relu"'):
        run_teacher_cache(model, latents, cache)
    reset_accelerate()
    settings = TeacherCacheSettings(
        teacher=str(model), latents=latents, out=cache, rounds=2, entries_per_shard=6, tokens=16
    )
    with pytest.raises(ShardError, match=r'teacher_config\.act_fn: null -> "relu"'):
        teacher_cache.plan(settings)
    assert tree(cache) == before
    # What is stated for each block alike means the same as what is stated once.
    change_json(model / "unet/config.json", act_fn="silu", attention_head_dim=[2, 2, 2, 2])
    assert "still to write: 14 entries in 4 shards" in teacher_cache.plan(settings)
    run_teacher_cache(model, latents, cache)
    assert (cache / "manifest.json").read_bytes() == before["manifest.json"]
    change_json(model / "unet/config.json", act_fn="relu")
    status, output = verify(cache, "--recompute", "1", "--teacher", str(model), "--device", "cpu")
    assert status == 2
    assert "another unet/config.json than that of --teacher" in output
    assert "differ in act_fn" in output


def finetuned(model, latents, out, steps):
    quick = {"train_batch_size": 2, "dataloader_num_workers": 0, "device": "cpu", "report": False}
    finetune.run(FinetuneSettings(model=str(model), latents=latents, out=out, max_train_steps=steps, **quick))
    reset_accelerate()


@pytest.mark.parametrize(
    ("file", "changes", "field"),
    [
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "noise_scheduler.beta_end: 0.012 -> 0.02"),
        (
            "scheduler/scheduler_config.json",
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "noise_scheduler.rescale_betas_zero_snr",
        ),
        ("unet/config.json", {"act_fn": "relu"}, 'model_config.act_fn: null -> "relu"'),
    ],
)
def test_a_training_is_not_resumed(model, images, tmp_path, file, changes, field):
    latents = run_encode(model, images, tmp_path / "latents")
    finetuned(model, latents, tmp_path / "out", 1)
    change_json(model / file, **changes)
    with pytest.raises(ShardError, match=field):
        finetuned(model, latents, tmp_path / "out", 2)


def test_a_training_that_an_earlier_version_began_is_resumed(model, images, tmp_path):
    latents = run_encode(model, images, tmp_path / "latents")
    finetuned(model, latents, tmp_path / "out", 1)
    spec = json.loads((tmp_path / "out/spec.json").read_text())
    del spec["model_config"], spec["noise_scheduler"]
    (tmp_path / "out/spec.json").write_text(json.dumps(spec))
    finetuned(model, latents, tmp_path / "out", 2)
    assert json.loads((tmp_path / "out/finished.json").read_text())["step"] == 2
    assert json.loads((tmp_path / "out/spec.json").read_text()) == spec
