"""teacher-cache: what an entry holds, against the teacher asked again; rounds; determinism; refusals."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import webdataset
from click.testing import CliRunner
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from support.damage import verify as verified
from support.stages import (
    read_entries,
    reset_accelerate,
    run_distill,
    run_encode,
    run_teacher_cache,
    shard_files,
    state_dict_of,
    tree,
)
from support.tiny import tiny_pipeline, tiny_unet, write_images

from pipeline.cli import main
from pipeline.commands import teacher_cache, verify
from pipeline.commands.verify import VerifySettings
from pipeline.models.levels.sd import LEVELS
from pipeline.models.load import load_unet
from pipeline.system.errors import UserError
from pipeline.teacher_cache import TeacherCacheSettings
from shards.cache import Cache
from shards.dataset import CacheDataset
from shards.manifest import read_manifest
from shards.schema import ShardError
from shards.store import open_store

BLOCKS = [f"{kind}_blocks.{i}" for kind in ("down", "up") for i in range(4)]


def asked_again(teacher, sample, added="noise"):
    """The teacher's prediction and block outputs for an entry, by hooks and noising that are not ours."""
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet").eval()
    outputs = {}
    for name in [*BLOCKS, "mid_block"]:
        unet.get_submodule(name).register_forward_hook(
            lambda m, i, out, name=name: outputs.update({name: out if isinstance(out, torch.Tensor) else out[0]})
        )
    values = {n: torch.from_numpy(sample.tensors[n].values)[None].float() for n in ("latents", added, "prompt_embeds")}
    timesteps = torch.tensor([sample.meta["timestep"]])
    noisy = DDPMScheduler.from_pretrained(teacher, subfolder="scheduler").add_noise(
        values["latents"], values[added], timesteps
    )
    with torch.no_grad():
        prediction = unet(noisy, timesteps, encoder_hidden_states=values["prompt_embeds"]).sample
    return prediction[0], {name: output[0] for name, output in outputs.items()}


TENSORS = ["latents", "noise", "prompt_embeds", "teacher_pred"]


@pytest.mark.parametrize("codec", ["fp16", "fp32"])
def test_an_exact_cache_holds_the_teachers_outputs(teacher, latents, tmp_path, codec):
    cache = run_teacher_cache(teacher, latents, tmp_path / "c", codec=codec, tokens=0, rounds=1)
    tolerance = {"fp16": 2e-3, "fp32": 1e-5}[codec]
    taps = [*BLOCKS, "mid_block"]
    for sample in read_entries(cache, "cache", [*TENSORS, *(f"tap.{tap}" for tap in taps)])[::5]:
        prediction, outputs = asked_again(teacher, sample)
        stored = {tap: torch.from_numpy(sample.tensors[f"tap.{tap}"].values).float() for tap in taps}
        teacher_pred = torch.from_numpy(sample.tensors["teacher_pred"].values).float()
        torch.testing.assert_close(teacher_pred, prediction, rtol=tolerance, atol=tolerance)
        for tap in taps:
            torch.testing.assert_close(stored[tap], outputs[tap], rtol=tolerance, atol=tolerance)


def test_a_quantised_cache_is_within_half_a_step_at_the_sampled_positions(teacher, cache):
    dataset = CacheDataset(open_store(cache), [*BLOCKS, "mid_block"])
    loaded = [dataset[i] for i in range(0, 26, 5)]
    batch, calibrations = dataset.collate(loaded), dataset.calibrations()
    for b, sample in enumerate(loaded):
        _, outputs = asked_again(teacher, sample)
        for tap, feature in batch.features.items():
            expected = outputs[tap][:, feature.rows[b] :: feature.stride, feature.columns[b] :: feature.stride]
            _, rotation = calibrations[tap]
            error = rotation @ (feature.decode(calibrations[tap])[b] - expected).flatten(1)
            assert error.abs().max() <= feature.quant_step[b] / 2 + 1e-4
    with pytest.raises(ValueError, match="pass its calibration"):
        batch.features["mid_block"].decode()
    assert {tap: f.stride for tap, f in batch.features.items()}["up_blocks.3"] == 4
    assert batch.features["mid_block"].stride == 1


def test_the_calibrations_are_learned_from_the_teacher_and_stay_when_rounds_are_added(
    teacher, latents, cache_of_one_round, tmp_path
):
    """Means and principal directions of the first round's features, as numpy finds them in an exact cache."""
    exact = run_teacher_cache(teacher, latents, tmp_path / "exact", codec="fp32", rounds=1)
    out = shutil.copytree(cache_of_one_round, tmp_path / "c")
    tap = "tap.up_blocks.3"
    vectors = np.concatenate(
        [np.moveaxis(e.tensors[tap].values, 0, -1).reshape(-1, 8) for e in read_entries(exact, "cache", [tap])]
    )
    found = Cache(open_store(out)).calibrations()["up_blocks.3"]
    np.testing.assert_allclose(found.mu, vectors.mean(0), atol=1e-4)
    covariance = np.cov((vectors @ found.rotation.T).T.astype(np.float64))
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-4 * covariance[0, 0])
    assert (np.diff(np.diag(covariance)) <= 1e-6).all()
    before = (out / "calibration.safetensors").read_bytes()
    run_teacher_cache(teacher, latents, out, rounds=2)
    assert (out / "calibration.safetensors").read_bytes() == before
    assert not (exact / "calibration.safetensors").exists()


def test_without_its_calibrations_a_cache_is_not_read(teacher, latents, cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    (copy / "calibration.safetensors").unlink()
    with pytest.raises(ShardError, match="calibration.safetensors is missing or was changed"):
        run_distill(copy, tmp_path / "student")
    with pytest.raises(ShardError, match="calibration.safetensors is missing or was changed"):
        run_teacher_cache(teacher, latents, copy, rounds=3)
    assert "calibration.safetensors is missing or was changed" in verified(copy)[1]


def test_stock_webdataset_reads_every_member(cache):
    """The targets and the images, which their keys join."""
    rounds, images = (sorted(map(str, cache.glob(pattern))) for pattern in ("r*.tar", "images/s*.tar"))
    found = list(webdataset.WebDataset(rounds, shardshuffle=False).decode())
    image_of = {image["__key__"]: image for image in webdataset.WebDataset(images, shardshuffle=False).decode()}
    assert len({s["__key__"] for s in found}) == 26
    joined = {entry.key: entry for entry in read_entries(cache, "cache", ["noise", "latents", "prompt_embeds"])}
    for sample in found:
        assert sample["noise.npy"].shape == (4, 16, 16)
        assert sample["teacher_pred.npy"].dtype == np.float16
        assert {f"tap.{tap}.npy.zst" for tap in [*BLOCKS, "mid_block"]} <= sample.keys()
        assert not {"latents.npy", "prompt_embeds.npy"} & sample.keys()
        image, entry = image_of[sample["__key__"].split("-")[0]], joined[sample["__key__"]]
        assert image["json"]["caption"].startswith("picture")
        assert entry.meta == {**image["json"], **sample["json"]}
        np.testing.assert_array_equal(entry.tensors["noise"].values, sample["noise.npy"])
        np.testing.assert_array_equal(entry.tensors["latents"].values, image["latents.npy"])
        np.testing.assert_array_equal(entry.tensors["prompt_embeds"].values, image["prompt_embeds.npy"])


def test_two_runs_write_the_same_bytes(teacher, latents, cache, tmp_path):
    assert shard_files(run_teacher_cache(teacher, latents, tmp_path / "again")) == shard_files(cache)


def test_batch_sizes_change_nothing_but_rounding(teacher, latents, tmp_path):
    one, seven = (
        read_entries(
            run_teacher_cache(teacher, latents, tmp_path / str(size), batch_size=size, codec="fp32", rounds=1),
            "cache",
            [*TENSORS, "tap.up_blocks.3"],
        )
        for size in (1, 7)
    )
    assert [(s.key, s.meta) for s in one] == [(s.key, s.meta) for s in seven]
    for a, b in zip(one, seven, strict=True):
        np.testing.assert_array_equal(a.tensors["noise"].values, b.tensors["noise"].values)
        for name in ("teacher_pred", "tap.up_blocks.3"):
            np.testing.assert_allclose(a.tensors[name].values, b.tensors[name].values, rtol=1e-4, atol=1e-5)


def test_each_round_has_its_own_noise_and_a_timestep_of_another_half(cache):
    by_image = {}
    for sample in read_entries(cache, "cache", ["noise"]):
        by_image.setdefault(sample.meta["source_id"], []).append(sample)
    assert len(by_image) == 13
    for first, second in by_image.values():
        assert sorted((first.meta["timestep"] // 500, second.meta["timestep"] // 500)) == [0, 1]
        assert not np.array_equal(first.tensors["noise"].values, second.tensors["noise"].values)


def test_raising_rounds_adds_shards_and_rewrites_nothing(teacher, latents, cache, tmp_path, capsys):
    out = shutil.copytree(cache, tmp_path / "c")
    before, stamps = shard_files(out), {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix != ".json"}
    run_teacher_cache(teacher, latents, out, rounds=3)
    after = shard_files(out)
    assert {name: after[name] for name in before} == before
    targets = [name for name in before if name.startswith("r0")]
    assert len(after) == len(before) + len(targets) // 2
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert len(CacheDataset(open_store(out), ["mid_block"])) == 39
    run_teacher_cache(teacher, latents, out, rounds=2)
    assert "already finished, nothing to do" in capsys.readouterr().out
    assert shard_files(out) == after


def test_a_level_that_is_added_to_a_finished_cache_is_told(teacher, latents, cache_of_one_round, tmp_path, capsys):
    out = shutil.copytree(cache_of_one_round, tmp_path / "c")
    capsys.readouterr()
    run_teacher_cache(teacher, latents, out, rounds=1, students=["sd_small", "bk_base"])
    assert capsys.readouterr().out.startswith(
        f"wrote students/bk_base, all else was there: {out} holds 13 entries (1 round)"
    )


def test_a_missing_shard_is_written_again_with_the_same_bytes(teacher, latents, cache, tmp_path):
    out = shutil.copytree(cache, tmp_path / "c")
    before = shard_files(out)
    (out / "r0001-s00001.index").unlink()
    (out / "r0000-s00000.index").unlink()
    (out / "r0000-s00000.tar").unlink()
    run_teacher_cache(teacher, latents, out)
    assert shard_files(out) == before


def test_initial_students_and_base_are_written(teacher, latents, tmp_path):
    out = run_teacher_cache(teacher, latents, tmp_path / "c", students=tuple(LEVELS), rounds=1)
    for level in LEVELS:
        student = UNet2DConditionModel.from_pretrained(out / "students" / level)
        weights = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet").state_dict()
        assert torch.equal(student.state_dict()["conv_in.weight"], weights["conv_in.weight"])
    assert len(json.loads((out / "manifest.json").read_text())["spec"]["taps"]) == 10
    assert {path.name for path in (out / "base").iterdir()} == {
        "model_index.json",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "checksums.json",
    }


def test_unconditional_entries_hold_the_empty_prompt(teacher, latents, tmp_path):
    out = run_teacher_cache(teacher, latents, tmp_path / "c", uncond_fraction=0.5, rounds=3)
    empty = np.load(latents / "empty_prompt_embeds.npy")
    found = read_entries(out, "cache", ["prompt_embeds"])
    flags = [sample.meta["unconditional"] for sample in found]
    assert 5 < sum(flags) < 34
    for sample in found:
        assert np.array_equal(sample.tensors["prompt_embeds"].values, empty) == sample.meta["unconditional"]


def test_the_noise_offset_reaches_the_noise(teacher, latents, cache, tmp_path):
    plain = read_entries(cache, "cache", ["noise"])
    moved = read_entries(run_teacher_cache(teacher, latents, tmp_path / "c", noise_offset=1.0), "cache", ["noise"])
    for a, b in zip(plain, moved, strict=True):
        shift = b.tensors["noise"].values.astype(np.float32) - a.tensors["noise"].values
        assert shift.std(axis=(1, 2)).max() < 5e-3
        assert np.abs(shift.mean(axis=(1, 2))).max() > 0.05


def test_input_perturbation_changes_what_the_teacher_sees_and_not_the_noise(teacher, latents, cache, tmp_path):
    out = run_teacher_cache(teacher, latents, tmp_path / "c", input_perturbation=0.3)
    plain = read_entries(cache, "cache", ["noise", "teacher_pred"])
    moved = read_entries(out, "cache", [*TENSORS, "input_noise"])
    added = []
    for a, b in zip(plain, moved, strict=True):
        np.testing.assert_array_equal(a.tensors["noise"].values, b.tensors["noise"].values)
        assert not np.array_equal(a.tensors["teacher_pred"].values, b.tensors["teacher_pred"].values)
        added.append(b.tensors["input_noise"].values.astype(np.float32) - b.tensors["noise"].values)
    assert np.std(added) == pytest.approx(0.3, rel=0.05)
    assert abs(np.mean(added)) < 0.02
    for sample in moved[::9]:
        prediction, _ = asked_again(teacher, sample, "input_noise")
        stored = torch.from_numpy(sample.tensors["teacher_pred"].values).float()
        torch.testing.assert_close(stored, prediction, rtol=2e-3, atol=2e-3)
    verify.run(VerifySettings(directory=out, recompute=3, teacher=str(teacher)))


def test_the_prediction_type_is_the_schedulers_unless_it_is_set(v_teacher, teacher, images, latents, tmp_path):
    def spec(out):
        return json.loads((out / "manifest.json").read_text())["spec"]["prediction_type"]

    v_latents = run_encode(v_teacher, images, tmp_path / "v-latents")
    assert spec(run_teacher_cache(v_teacher, v_latents, tmp_path / "v", rounds=1)) == "v_prediction"
    out = run_teacher_cache(teacher, latents, tmp_path / "set", rounds=1, prediction_type="v_prediction")
    assert spec(out) == "v_prediction"
    scheduler = json.loads((out / "base" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


def test_a_level_whose_taps_are_there_is_added_to_a_finished_cache(teacher, latents, tmp_path):
    out = run_teacher_cache(teacher, latents, tmp_path / "c", rounds=1)
    before, manifest = tree(out), read_manifest(open_store(out))
    run_teacher_cache(teacher, latents, out, rounds=1, students=("sd_tiny", "bk_small"))
    after, extended = tree(out), read_manifest(open_store(out))
    # The manifest states the checksums of the new levels too.
    assert (extended.spec, extended.rounds) == (manifest.spec, manifest.rounds)
    added = extended.files.keys() - manifest.files.keys()
    assert added == {"students/sd_tiny/checksums.json", "students/bk_small/checksums.json"}
    assert manifest.files.items() <= extended.files.items()
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert {name.split("/")[1] for name in after if name.startswith("students/")} == {"sd_small", "sd_tiny", "bk_small"}


def test_latents_without_images_are_refused(teacher, tmp_path):
    data = write_images(tmp_path / "data", 2)
    for path in data.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError):
        run_encode(teacher, data, tmp_path / "latents", max_skipped=1.0)
    with pytest.raises(UserError, match="holds no images"):
        run_teacher_cache(teacher, tmp_path / "latents", tmp_path / "c")


def broken_teacher(folder, teacher, change):
    pipe = tiny_pipeline()
    with torch.no_grad():
        change(pipe.unet)
    pipe.save_pretrained(folder)
    return folder


def test_nan_from_the_teacher_names_the_entry_and_leaves_no_shard(teacher, latents, tmp_path):
    broken = broken_teacher(tmp_path / "broken", teacher, lambda unet: unet.conv_out.bias.fill_(float("nan")))
    with pytest.raises(
        UserError, match=r"NaN or Inf in teacher_pred of entry 000000000-r0000 \(000.png, timestep \d+\)"
    ):
        run_teacher_cache(broken, latents, tmp_path / "c")
    assert not list((tmp_path / "c").glob("r*"))


def test_features_that_do_not_fit_fp16_name_the_codecs_that_take_them(teacher, latents, tmp_path):
    broken = broken_teacher(
        tmp_path / "loud", teacher, lambda unet: unet.down_blocks[0].downsamplers[0].conv.bias.fill_(1e6)
    )
    with pytest.raises(
        UserError, match=r"tap.down_blocks.0 of entry 000000000-r0000 does not fit in fp16. .*dither or fp32"
    ):
        run_teacher_cache(broken, latents, tmp_path / "c", codec="fp16")
    run_teacher_cache(broken, latents, tmp_path / "d", codec="dither", rounds=1)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"snr_db": 15.0}, "codec.snr_db: 5.0 -> 15.0"),
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"tokens": 0}, "taps.down_blocks.0.stride: 2 -> 1"),
        ({"students": ("bk_tiny",)}, "taps.down_blocks.2.attentions.1.proj_out"),
    ],
)
def test_other_settings_on_the_same_output_are_refused_with_the_difference(teacher, latents, cache, changes, line):
    before = tree(cache)
    with pytest.raises(ShardError, match=line):
        run_teacher_cache(teacher, latents, cache, **changes)
    assert tree(cache) == before


def dry_run(teacher, latents, out, *options):
    """The plan's figures: entries and shards still to write, and forward passes."""
    options = ["--rounds", 2, "--tokens", 16, "--entries-per-shard", 6, *options]
    arguments = ["teacher-cache", "--teacher", teacher, "--latents", latents, "--out", out, *options, "--dry-run"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    entries, shards = re.search(r"still to write: (\d+) entr\w+ in (\d+) shard", result.output).groups()
    return int(entries), int(shards), int(re.search(r"forward passes: (\d+)", result.output)[1])


def test_a_dry_run_counts_what_is_still_to_be_written(teacher, latents, cache, tmp_path):
    """13 images in shards of 6, 6 and 1, in two rounds."""
    copy = shutil.copytree(cache, tmp_path / "cache")
    assert dry_run(teacher, latents, tmp_path / "new") == (26, 6, 26)
    assert dry_run(teacher, latents, tmp_path / "new", "--shard-range", "2:5") == (13, 3, 13)
    assert dry_run(teacher, latents, copy) == (0, 0, 0)
    assert dry_run(teacher, latents, copy, "--rounds", 3) == (13, 3, 13)
    for name in ("r0000-s00001.index", "r0001-s00002.index"):
        (copy / name).unlink()
    assert dry_run(teacher, latents, copy) == (7, 2, 7)
    # The rounds that the cache has already are completed with it.
    assert dry_run(teacher, latents, copy, "--rounds", 1) == (7, 2, 7)
    assert dry_run(teacher, latents, copy, "--shard-range", ":3") == (6, 1, 6)


def test_a_dry_run_refuses_other_settings(teacher, latents, cache):
    arguments = ["--teacher", teacher, "--latents", latents, "--out", cache, "--rounds", 2, "--seed", 5, "--dry-run"]
    arguments += ["--tokens", 16, "--entries-per-shard", 6]
    result = CliRunner().invoke(main, ["teacher-cache", *map(str, arguments)])
    assert (result.exit_code, "seed: 0 -> 5" in result.output) == (2, True)


def test_a_small_disk_is_refused_before_anything_is_written(teacher, latents, cache, tmp_path, monkeypatch):
    """Room for the shards but not for base/ and the students is too little."""
    shards = sum(path.stat().st_size for path in cache.glob("r0*"))
    monkeypatch.setattr("pipeline.system.disk.free_bytes", lambda out: int(1.1 * shards))
    with pytest.raises(UserError, match="needs about .* more, but its disk has only"):
        run_teacher_cache(teacher, latents, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run_teacher_cache(teacher, latents, cache)


def test_other_versions_of_the_libraries_are_refused_with_the_command_that_installs_them(
    teacher, latents, cache, monkeypatch
):
    installed = json.loads((cache / "manifest.json").read_text())["spec"]["libraries"]
    monkeypatch.setattr("pipeline.cache.cache_spec.library_versions", lambda: {**installed, "torch": "99.0"})
    with pytest.raises(ShardError) as caught:
        run_teacher_cache(teacher, latents, cache)
    torch_version = installed["torch"].split("+")[0]
    assert 'libraries.torch: "' in str(caught.value)
    assert f"pip install torch=={torch_version} diffusers=={installed['diffusers']}" in str(caught.value)
    with pytest.raises(ShardError) as caught:
        run_teacher_cache(teacher, latents, cache, seed=3)
    monkeypatch.undo()
    with pytest.raises(ShardError) as caught:
        run_teacher_cache(teacher, latents, cache, seed=3)
    assert "pip install" not in str(caught.value)


def test_another_teachers_latents_are_refused(latents, tmp_path):
    tiny_pipeline(seed=4).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="encoded with another VAE than the one of --teacher"):
        run_teacher_cache(tmp_path / "other", latents, tmp_path / "c")


def test_another_unet_of_the_same_name_is_refused_on_the_same_output(teacher, latents, cache, tmp_path):
    changed = broken_teacher(tmp_path / "changed", teacher, lambda unet: unet.conv_in.bias.add_(1e-3))
    with pytest.raises(ShardError, match="teacher_sha256"):
        run_teacher_cache(changed, latents, cache)


def test_unfinished_latents_are_refused(teacher, images, tmp_path):
    latents = run_encode(teacher, images, tmp_path / "latents")
    (latents / "s00002.index").unlink()
    with pytest.raises(ShardError, match="is unfinished. Missing shards: 1 of 3"):
        run_teacher_cache(teacher, latents, tmp_path / "c")


def test_a_pruned_teacher_is_refused(images, tmp_path):
    pipe = tiny_pipeline()
    pipe.unet = tiny_unet(layers_per_block=1)
    pipe.save_pretrained(tmp_path / "small")
    latents = run_encode(tmp_path / "small", images, tmp_path / "latents")
    with pytest.raises(UserError, match="layers_per_block is 1, not 2"):
        run_teacher_cache(tmp_path / "small", latents, tmp_path / "c")


def test_taps_are_sampled_also_where_the_stride_does_not_divide(teacher, latents, tmp_path):
    """Rows and columns go on at the start, and a student trains on them."""
    cache = run_teacher_cache(teacher, latents, tmp_path / "c", codec="fp32", tokens=25, rounds=1)
    dataset = CacheDataset(open_store(cache), ["up_blocks.3"])
    loaded = [dataset[i] for i in range(0, 13, 4)]
    feature = dataset.collate(loaded).features["up_blocks.3"]
    for b, sample in enumerate(loaded):
        _, outputs = asked_again(teacher, sample)
        rows, columns = ([(start + 3 * i) % 16 for i in range(5)] for start in (feature.rows[b], feature.columns[b]))
        expected = outputs["up_blocks.3"][:, rows][:, :, columns]
        torch.testing.assert_close(feature.decode()[b], expected, rtol=1e-5, atol=1e-5)
    run_distill(cache, tmp_path / "student", max_train_steps=1)


def test_a_dry_run_refuses_what_the_run_refuses(latents, tmp_path):
    tiny_pipeline(seed=4, cross_attention_dim=12).save_pretrained(tmp_path / "other")
    settings = {"teacher": str(tmp_path / "other"), "latents": latents, "out": tmp_path / "c", "device": "cpu"}
    for act in (teacher_cache.plan, teacher_cache.run):
        with pytest.raises(UserError, match="was encoded with another VAE than the one of --teacher"):
            act(TeacherCacheSettings(**settings))


def test_a_scheduler_that_cannot_be_sampled_is_refused_before_the_first_shard(latents, tmp_path):
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler(num_train_timesteps=4)
    pipe.save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="the scheduler dpm cannot sample from --teacher .* in 25 steps"):
        run_teacher_cache(tmp_path / "short", latents, tmp_path / "c", samples=1)
    assert not (tmp_path / "c").exists()
    run_teacher_cache(tmp_path / "short", latents, tmp_path / "c", samples=0, rounds=1)


def test_samples_that_could_not_be_decoded_are_refused_before_the_first_shard(teacher, latents, tmp_path, monkeypatch):
    def decode(self, *arguments, **options):
        raise NotImplementedError("this VAE has no decoder")

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    with pytest.raises(
        UserError, match=r"the VAE of --teacher .* cannot decode \(this VAE has no decoder\). Fix it, or"
    ):
        run_teacher_cache(teacher, latents, tmp_path / "c", samples=1)
    assert not (tmp_path / "c").exists()


def test_samples_of_a_size_that_cannot_be_generated_are_refused_before_the_first_shard(teacher, images, tmp_path):
    """A U-Net without a size of its own generates images as large as the data."""
    model = shutil.copytree(teacher, tmp_path / "model")
    path = model / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": None}))
    latents = run_encode(model, images, tmp_path / "latents", resolution=36)
    with pytest.raises(UserError, match=r"have 36 pixels, which is no multiple of 8, so no samples can be generated"):
        run_teacher_cache(model, latents, tmp_path / "c", samples=1)
    reset_accelerate()
    assert not (tmp_path / "c").exists()
    run_teacher_cache(model, latents, tmp_path / "c", samples=0, rounds=1)


def test_targets_of_an_image_that_was_replaced_are_refused_with_what_to_do(teacher, tmp_path):
    data = write_images(tmp_path / "data", 7)
    latents = run_encode(teacher, data, tmp_path / "latents")
    cache = run_teacher_cache(teacher, latents, tmp_path / "cache", entries_per_shard=3, codec="fp32")
    for name in ("s00001.tar", "s00001.index"):
        (latents / name).unlink()
    Image.new("RGB", (50, 40), "red").save(data / "006.png")
    run_encode(teacher, data, latents)
    before = tree(cache)
    with pytest.raises(UserError, match=r"latents/s00001.tar changed after .* choose another --out, or") as caught:
        run_teacher_cache(teacher, latents, cache, entries_per_shard=3, codec="fp32")
    reset_accelerate()
    assert tree(cache) == before
    # With its own images it goes on.
    run_teacher_cache(teacher, cache / "images", cache, entries_per_shard=3, codec="fp32")
    assert {**tree(cache), "teacher-cache.json": b""} == {**before, "teacher-cache.json": b""}

    names = re.search(r"delete (.*), in ", str(caught.value))[1]
    targets = [f"r000{r}-s0000{s}" for r in (0, 1) for s in (1, 2)]
    assert re.split(", and |, | and ", names) == [
        f"{name}.{ending}" for name in ("images/s00001", *targets) for ending in ("tar", "index")
    ]
    for name in re.split(", and |, | and ", names):
        (cache / name).unlink()
    run_teacher_cache(teacher, latents, cache, entries_per_shard=3, codec="fp32")
    fresh = run_teacher_cache(teacher, latents, tmp_path / "fresh", entries_per_shard=3, codec="fp32")
    assert shard_files(cache) == shard_files(fresh)


def test_a_teacher_in_half_precision_gives_the_cache_of_one_with_the_same_numbers_in_full(teacher, latents, tmp_path):
    """It is loaded as its files are, which takes half the memory. Its students are written in float32."""
    folders = [shutil.copytree(teacher, tmp_path / name) for name in ("half", "full")]
    unet = UNet2DConditionModel.from_pretrained(teacher / "unet").half()
    for folder, dtype in zip(folders, (torch.float16, torch.float32), strict=True):
        unet.to(dtype).save_pretrained(folder / "unet")
    assert load_unet(folders[0], None, as_stored=True).dtype == torch.float16
    assert load_unet(folders[1], None, as_stored=True).dtype == torch.float32
    caches = [
        run_teacher_cache(folder, latents, tmp_path / f"{folder.name}-cache", rounds=1, students=("sd_tiny",))
        for folder in folders
    ]
    specs = [read_manifest(open_store(cache)).spec for cache in caches]
    assert specs[0] == specs[1]
    assert tree(caches[0] / "students") == tree(caches[1] / "students")
    # Sums are rounded in other places where the weights lie otherwise in memory.
    for half, full in zip(*(read_entries(cache, "cache", ["teacher_pred"]) for cache in caches), strict=True):
        np.testing.assert_allclose(half.tensors["teacher_pred"].values, full.tensors["teacher_pred"].values, atol=1e-3)
    assert {tensor.dtype for tensor in state_dict_of(caches[0] / "students" / "sd_tiny").values()} == {torch.float32}
    output = verified(caches[0], "--recompute", "2", "--teacher", str(folders[1]), "--device", "cpu")[1]
    assert "no damage found" in output
