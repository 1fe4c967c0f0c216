"""--validation-latents: the error on images that are not trained on, against one computed with diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from support.stages import metrics, read_entries, run_distill, run_encode, run_teacher_cache, state_dict_of
from support.tiny import write_images

from pipeline.commands import finetune
from pipeline.core import draws
from pipeline.settings.finetune import FinetuneSettings
from pipeline.system.errors import UserError
from shards.schema import ShardError

COUNT = 11


@pytest.fixture(scope="module")
def work(teacher, latents, cache_of_one_round, tmp_path_factory):
    """Latents and caches to train on and of held-out images."""
    folder = tmp_path_factory.mktemp("held-out")
    (folder / "train-latents").symlink_to(latents)
    (folder / "train-cache").symlink_to(cache_of_one_round)
    held_out = run_encode(teacher, write_images(folder / "images", COUNT, seed=7), folder / "held_out-latents")
    run_teacher_cache(teacher, held_out, folder / "held_out-cache", rounds=1)
    return folder


def lines_of(out):
    """{step: the held-out errors}."""
    return {
        line["step"]: {name: value for name, value in line.items() if name != "step"}
        for line in metrics(out)
        if any(name.startswith("held_out/") for name in line)
    }


def error_by_diffusers(unet, entries, timesteps, noises, targets):
    """The mean square error of a network's prediction over single entries."""
    scheduler, errors = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), []
    for entry, timestep, noise, target in zip(entries, timesteps, noises, targets, strict=True):
        latents, prompts = (torch.tensor(entry.tensors[n].values).float()[None] for n in ("latents", "prompt_embeds"))
        noisy = scheduler.add_noise(latents, noise[None], torch.tensor([timestep]))
        with torch.no_grad():
            prediction = unet(noisy, timestep, prompts).sample
        errors.append((prediction - target).square().mean().item())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_error_on_a_cache_is_that_of_the_saved_student(work, tmp_path, use_ema):
    held_out = work / "held_out-cache"
    out = run_distill(
        work / "train-cache", tmp_path / "out", validation_latents=held_out, validation_steps=3, use_ema=use_ema
    )
    found = lines_of(out)
    assert list(found) == [0, 3, 4]
    entries = read_entries(held_out, "cache", ["latents", "noise", "teacher_pred", "prompt_embeds"])
    assert len(entries) == COUNT
    timesteps = [entry.meta["timestep"] for entry in entries]
    noises, predictions = (
        [torch.tensor(entry.tensors[name].values).float() for entry in entries] for name in ("noise", "teacher_pred")
    )
    for step, folder in ((0, work / "train-cache" / "students" / "sd_small"), (4, out / "unet")):
        unet = UNet2DConditionModel.from_pretrained(folder).eval()
        task, output = (
            error_by_diffusers(unet, entries, timesteps, noises, targets) for targets in (noises, predictions)
        )
        assert found[step] == pytest.approx({"held_out/task": task, "held_out/output": output}, rel=1e-3)


def test_latents_get_noise_of_their_own_over_the_whole_schedule(work, tmp_path):
    held_out = work / "held_out-latents"
    out = run_distill(work / "train-cache", tmp_path / "out", validation_latents=held_out)
    entries = read_entries(held_out, "latents", ["latents", "prompt_embeds"])
    timesteps, noises = [], []
    for i, entry in enumerate(entries):
        name = entry.meta["source_id"]
        timesteps.append(int((i + draws.generator(0, name, 0, "held-out").random()) / COUNT * 1000))
        noises.append(torch.from_numpy(draws.noise(0, name, 0, entry.tensors["latents"].values.shape, 0.0)).float())
    assert max(timesteps) > 900
    assert min(timesteps) < 100
    unet = UNet2DConditionModel.from_pretrained(out / "unet").eval()
    expected = error_by_diffusers(unet, entries, timesteps, noises, noises)
    assert lines_of(out)[4] == pytest.approx({"held_out/task": expected}, rel=1e-3)


def test_it_changes_nothing_in_the_training_and_survives_a_resume(work, tmp_path):
    plain = run_distill(work / "train-cache", tmp_path / "plain", use_ema=True)
    more = {"validation_latents": work / "held_out-cache", "validation_steps": 2, "use_ema": True}
    whole = run_distill(work / "train-cache", tmp_path / "whole", **more)
    out = run_distill(work / "train-cache", tmp_path / "out", max_train_steps=3, **more)
    assert list(lines_of(out)) == [0, 2, 3]
    run_distill(work / "train-cache", out, **more)
    assert lines_of(out) == {**lines_of(whole), 3: lines_of(out)[3]}
    left, right = state_dict_of(plain / "unet"), state_dict_of(out / "unet")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_finetune_measures_it_too(work, teacher, tmp_path):
    latents, held_out = work / "train-latents", work / "held_out-latents"
    settings = {
        "max_train_steps": 2,
        "train_batch_size": 2,
        "device": "cpu",
        "dataloader_num_workers": 0,
        "report": False,
    }
    out = tmp_path / "out"
    finetune.run(
        FinetuneSettings(model=str(teacher), latents=latents, out=out, validation_latents=held_out, **settings)
    )
    assert [*lines_of(out)] == [0, 2]


def test_what_is_trained_on_is_not_held_out(work, tmp_path):
    for held_out in ("train-latents", "train-cache"):
        with pytest.raises(UserError, match="holds the images that are trained on"):
            run_distill(work / "train-cache", tmp_path / "out", validation_latents=work / held_out)


def test_entries_of_another_teacher_and_other_folders_are_refused(work, images, tmp_path):
    from support.tiny import tiny_pipeline

    torch.manual_seed(5)
    tiny_pipeline(seed=5).save_pretrained(tmp_path / "other")
    other = run_encode(tmp_path / "other", images, tmp_path / "latents")
    with pytest.raises(UserError, match="encoded with another VAE"):
        run_distill(work / "train-cache", tmp_path / "out", validation_latents=other)
    with pytest.raises(ShardError, match="has no manifest"):
        run_distill(work / "train-cache", tmp_path / "out", validation_latents=images)
