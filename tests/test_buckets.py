"""`encode --buckets` on the whole road: images of several shapes, from encoding to a student."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from accelerate import Accelerator
from click.testing import CliRunner
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import ExifTags, Image
from support.processes import in_two_processes
from support.stages import (
    bytes_per_entry,
    metrics,
    prepared,
    read_entries,
    reset_accelerate,
    run_distill,
    run_encode,
    run_teacher_cache,
    shard_files,
    state_dict_of,
    tree,
)

from pipeline.cache import latents_spec, latents_writer
from pipeline.cli import main
from pipeline.commands import encode, finetune, inspect_shards, teacher_cache, verify
from pipeline.commands.finetune import LatentsDataset
from pipeline.core import draws
from pipeline.data.images import decode
from pipeline.encode import EncodeSettings
from pipeline.settings.finetune import FinetuneSettings
from pipeline.settings.inspect_shards import InspectSettings
from pipeline.settings.verify import VerifySettings
from pipeline.system.errors import UserError
from pipeline.teacher_cache import TeacherCacheSettings
from pipeline.training.held_out import batches_of_latents
from pipeline.training.objective import Objective
from shards.dataset import CacheDataset
from shards.reader import ShardSet
from shards.store import open_store

pytestmark = pytest.mark.usefixtures("sides_in_steps_of_eight", "few_steps", "remembered_evaluations")

FORMAT = Path(__file__).parent.parent / "shards" / "README.md"
# (width, height) of the files. The first is stored on its side.
FILES = {"a.jpg": (34, 60), "b": (40, 40), "c": (33, 60), "d": (64, 34), "e": (48, 45), "f": (80, 50), "g": (50, 80)}
# (height, width) in pixels of what is made of each, in the order of the buckets.
CUT = {"c": (40, 24), "g": (40, 24), "b": (32, 32), "e": (32, 32), "a.jpg": (24, 40), "d": (24, 40), "f": (24, 40)}
ONE_ROUND = {"rounds": 1, "batch_size": 2, "entries_per_shard": 2, "students": ("sd_small",)}


def write_shapes(folder, seed, words="picture"):
    folder.mkdir()
    draw = np.random.default_rng(seed)
    for name, (width, height) in FILES.items():
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        exif = image.getexif()
        if name.endswith(".jpg"):
            exif[ExifTags.Base.Orientation] = 6
        image.save(folder / (name if name.endswith(".jpg") else f"{name}.png"), exif=exif)
        (folder / name).with_suffix(".txt").write_text(f"{words} {name[0]}")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes") / "images", 0)


def encoded(teacher, data, out, **changes):
    return run_encode(teacher, data, out, **{"buckets": True, "entries_per_shard": 2, "batch_size": 2, **changes})


@pytest.fixture(scope="module")
def latents(teacher, data, tmp_path_factory):
    return encoded(teacher, data, tmp_path_factory.mktemp("bucketed") / "latents")


@pytest.fixture(scope="module")
def cache(teacher, latents, tmp_path_factory):
    return run_teacher_cache(teacher, latents, tmp_path_factory.mktemp("bucketed") / "cache", **ONE_ROUND)


@pytest.fixture(scope="module")
def held_out(teacher, tmp_path_factory):
    work = tmp_path_factory.mktemp("held-out")
    return encoded(teacher, write_shapes(work / "images", 1, "another picture"), work / "latents")


@pytest.fixture(scope="module")
def student(cache, held_out, tmp_path_factory):
    out = tmp_path_factory.mktemp("bucketed") / "student"
    return run_distill(cache, out, train_batch_size=2, max_train_steps=2, validation_latents=held_out)


def stem(entry):
    return entry.meta["source_id"].removesuffix(".png")


def test_each_image_is_cut_to_its_bucket_and_encoded(teacher, data, latents):
    """Against Pillow and the VAE themselves. The sides cover the bucket, and the rest is cut off evenly."""
    vae = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None).vae
    entries = read_entries(latents, "latents", ["latents"])
    assert [stem(entry) for entry in entries] == list(CUT)
    assert [entry.key for entry in entries] == [f"{number:09d}" for number in range(7)]
    for entry in entries:
        height, width = CUT[stem(entry)]
        name = entry.meta["source_id"]
        image = decode((data / name).read_bytes())
        scale = max(height / image.height, width / image.width)
        resized = image.resize((int(image.width * scale + 1e-9), int(image.height * scale + 1e-9)), Image.BILINEAR)
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        pixels = np.asarray(resized.crop((left, top, left + width, top + height)))
        with torch.no_grad():
            posterior = vae.encode(torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
        noise = draws.standard_normal(0, name, 0, "posterior", (4, height // 2, width // 2))
        expected = (posterior.mean + posterior.std * torch.from_numpy(noise)) * vae.config.scaling_factor
        stored = torch.from_numpy(entry.tensors["latents"].values).float()
        torch.testing.assert_close(stored, expected[0], rtol=2e-3, atol=2e-3)
        assert entry.meta["caption"] == f"picture {stem(entry)[0]}"
    spec = json.loads((latents / "manifest.json").read_text())["spec"]
    assert [bucket["size"] for bucket in spec["buckets"]] == [[40, 24], [32, 32], [24, 40]]
    assert [bucket["entries"] for bucket in spec["buckets"]] == [2, 2, 3]
    # The bucket of each image, in the order of their names.
    assert np.load(latents / "buckets.npy").tolist() == [2, 1, 0, 2, 1, 2, 0]


def test_bytes_are_equal_whoever_writes_them_and_however_often_it_stops(teacher, data, tmp_path, monkeypatch):
    """One job stops within the last shard, another one writes the first, and a third goes on. Only the first looks at
    the shapes of the images."""
    alone = {"entries_per_shard": 6, "batch_size": 1, "views": 2, "random_flip": True}
    out, batches, real = tmp_path / "out", itertools.count(), latents_writer.encode_batch

    def stopping(*arguments):
        if next(batches) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    once = encoded(teacher, data, tmp_path / "once", **alone)
    with monkeypatch.context() as patch:
        patch.setattr(latents_writer, "encode_batch", stopping)
        with pytest.raises(KeyboardInterrupt):
            encoded(teacher, data, out, shard_range="2:3", **alone)
        reset_accelerate()
    assert (out / ".s00002.tar.kept").exists()
    monkeypatch.setattr(latents_spec, "assign", None)
    encoded(teacher, data, out, shard_range="0:1", **alone)
    encoded(teacher, data, out, **alone)
    assert shard_files(out) == shard_files(once)
    for name in ("manifest.json", "buckets.npy", "inputs-s00002.json"):
        assert (out / name).read_bytes() == (once / name).read_bytes()


def test_what_cannot_be_used_goes_to_the_largest_bucket_and_is_taken_up_there(teacher, data, tmp_path, capsys):
    """Alone in a bucket, it would be more than the share of a shard that may be skipped."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("b.png", "d.png", "f.png"):
        shutil.copy(data / name, images / name)
    Image.open(data / "c.png").resize((330, 600)).crop((0, 0, 330, 600)).save(images / "small.png")
    (images / "broken.png").write_bytes((data / "c.png").read_bytes()[:20])
    Image.new("RGB", (4, 8)).save(images / "tiny.png")
    for path in list(images.glob("*.png")):
        path.with_suffix(".txt").write_text("a picture")
    out = encoded(teacher, images, tmp_path / "out", entries_per_shard=9, min_size=8)
    assert [json.loads(line)["source_id"] for line in (out / "skipped.jsonl").read_text().splitlines()] == [
        "broken.png",
        "tiny.png",
    ]
    assert "buckets, width x height: 24 x 40: 1, 32 x 32: 1, 40 x 24: 4" in capsys.readouterr().out
    (images / "broken.png").write_bytes((data / "c.png").read_bytes())
    encoded(teacher, images, out, entries_per_shard=9, min_size=8, retry_skipped=True)
    found = {stem(entry): entry for entry in read_entries(out, "latents", ["latents"])}
    assert found["broken"].key == "000000002"
    assert found["broken"].tensors["latents"].values.shape == (4, 12, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": False}, "buckets: "),
        ({"resolution": 40}, "resolution: 32 -> 40"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"max_samples": 3}, "was made from other inputs: 7 entries -> 3"),
    ],
)
def test_other_settings_on_the_same_output_are_refused(teacher, data, latents, changes, message):
    before = tree(latents)
    with pytest.raises(Exception, match=message):
        encoded(teacher, data, latents, **changes)
    assert tree(latents) == before


def test_latents_without_buckets_get_none(teacher, images, data, tmp_path):
    out = run_encode(teacher, data, tmp_path / "out")
    with pytest.raises(UserError, match="was made without --buckets"):
        encoded(teacher, data, out)
    assert not (out / "buckets.npy").exists()
    with pytest.raises(UserError, match="--resolution 36 is not a multiple of 8, as --buckets needs it"):
        EncodeSettings(teacher="demo", data="d", out="o", resolution=36, buckets=True)
    with pytest.raises(UserError, match="--views 2 with --buckets gives the same pixels every time"):
        EncodeSettings(teacher="demo", data="d", out="o", resolution=32, buckets=True, views=2)


def test_the_cache_holds_what_the_teacher_gives_for_each_shape(teacher, cache, capsys):
    """Against the U-Net itself; then by `verify`, and by what `inspect` shows."""
    pipe = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    scheduler, kept = DDPMScheduler.from_config(pipe.scheduler.config), {}
    pipe.unet.up_blocks[3].register_forward_hook(lambda module, inputs, output: kept.update(last=output[0]))
    names, tap = ["latents", "noise", "prompt_embeds", "teacher_pred"], "up_blocks.3"
    dataset = CacheDataset(open_store(cache), [tap])
    calibration = dataset.calibrations()[tap]
    entries = read_entries(cache, "cache", names)
    assert [stem(entry) for entry in entries] == list(CUT)
    stated = json.loads((cache / "manifest.json").read_text())["spec"]["taps"][tap]
    assert stated == [
        {"shape": [8, height, width], "stride": stride}
        for height, width, stride in ((20, 12, 3), (16, 16, 4), (12, 20, 3))
    ]
    for index, entry in enumerate(entries):
        latents, noise, prompt, expected = (
            torch.from_numpy(entry.tensors[name].values)[None].float() for name in names
        )
        timesteps = torch.tensor([entry.meta["timestep"]])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.no_grad():
            prediction = pipe.unet(noisy, timesteps, encoder_hidden_states=prompt).sample
        torch.testing.assert_close(prediction, expected, rtol=2e-3, atol=2e-3)
        feature, place = dataset.collate([dataset[index]]).features[tap], entry.meta["taps"][tap]
        sides = latents.shape[2:]
        rows, columns = (
            [(place[name] + i * feature.stride) % side for i in range(side // feature.stride)]
            for name, side in zip(("row", "column"), sides, strict=True)
        )
        error = (feature.decode(calibration)[0] - kept["last"][:, rows][:, :, columns]).flatten(1)
        assert (calibration[1] @ error).abs().max() <= feature.quant_step / 2 + 1e-4
    capsys.readouterr()
    verify.run(VerifySettings(directory=cache, full=True, recompute=7, teacher=str(teacher), device="cpu"))
    assert "no damage found" in capsys.readouterr().out
    inspect_shards.run(InspectSettings(directory=cache))
    shown = capsys.readouterr().out
    assert "bucket 24 x 40 px: latents [4, 20, 12], 2 entries a round" in shown
    assert "bucket 40 x 24 px: latents [4, 12, 20], 3 entries a round" in shown


def test_the_reader_on_the_format_page_reads_it(cache, monkeypatch):
    monkeypatch.chdir(cache.parent)
    (snippet, *_) = re.findall(r"```python\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)
    reader: dict = {}
    exec(compile(snippet, str(FORMAT), "exec"), reader)
    dataset = CacheDataset(open_store(cache), ["up_blocks.3", "mid_block"])
    calibrations = dataset.calibrations()
    for index, place in enumerate(reader["entries"]):
        given = reader["images"][index], reader["manifest"], reader["calibration"]
        meta, tensors = reader["read_joined"](reader["cache"], place, *given)
        batch = dataset.collate([dataset[index]])
        assert meta["source_id"].removesuffix(".png") == list(CUT)[index]
        assert (tensors["latents"] == batch.latents[0].numpy()).all()
        for tap, feature in batch.features.items():
            expected = feature.decode(calibrations[tap])[0].numpy()
            np.testing.assert_allclose(tensors[f"tap.{tap}"], expected, rtol=1e-5, atol=1e-5)


def test_stock_webdataset_reads_it(cache):
    tars = lambda pattern: sorted(map(str, cache.glob(pattern)))  # noqa: E731
    images = {i["__key__"]: i for i in webdataset.WebDataset(tars("images/s*.tar"), shardshuffle=False).decode()}
    entries = list(webdataset.WebDataset(tars("r*.tar"), shardshuffle=False).decode())
    assert len(entries) == len(images) == 7
    for entry in entries:
        image = images[entry["__key__"].split("-")[0]]
        height, width = CUT[image["json"]["source_id"].removesuffix(".png")]
        assert entry["noise.npy"].shape == image["latents.npy"].shape == (4, height // 2, width // 2)


def planned(lines):
    """(size, entries, bytes of one) of each bucket, in the lines of a plan."""
    found = re.findall(r"^  (.*): (\d+) of ([\d,]+) bytes$", "\n".join(lines), re.MULTILINE)
    return [(size, int(entries), int(bytes_.replace(",", ""))) for size, entries, bytes_ in found]


def about(directory, *shards):
    return pytest.approx(bytes_per_entry(directory, list(shards)), rel=0.05)


def test_a_dry_run_counts_each_shape_and_its_bytes(teacher, data, latents, cache, tmp_path):
    options = {**ONE_ROUND, "rounds": 2, "device": "cpu", "tokens": 16}
    settings = TeacherCacheSettings(teacher=str(teacher), latents=latents, out=tmp_path / "planned", **options)
    lines = teacher_cache.plan(settings)
    assert "still to write: 14 entries in 8 shards" in lines
    assert planned(lines) == [
        ("latents of 20 x 12", 4, about(cache, "r0000-s00000")),
        ("latents of 16 x 16", 4, about(cache, "r0000-s00001")),
        ("latents of 12 x 20", 6, about(cache, "r0000-s00002", "r0000-s00003")),
    ]
    settings = EncodeSettings(
        teacher=str(teacher), data=str(data), out=tmp_path / "new", resolution=32, buckets=True, entries_per_shard=2
    )
    lines = encode.plan(settings)
    assert lines[0] == "entries: 7 in 4 shards, 4 of them still to write"
    assert planned(lines) == [
        ("24 x 40 px", 2, about(latents, "s00000")),
        ("32 x 32 px", 2, about(latents, "s00001")),
        ("40 x 24 px", 3, about(latents, "s00002", "s00003")),
    ]
    assert not (tmp_path / "new").exists()


def test_a_student_learns_from_all_shapes_and_a_stopped_training_resumes_bit_for_bit(cache, tmp_path, monkeypatch):
    settings = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 4, "checkpointing_steps": 1}
    whole, shapes = tmp_path / "whole", []
    real, calls = Objective.losses, itertools.count()

    def stopping(self, batch, *arguments):
        shapes.append(tuple(batch.latents.shape[2:]))
        if next(calls) == 8 + 5:
            raise RuntimeError("power cut")
        return real(self, batch, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "losses", stopping)
        run_distill(cache, whole, **settings)
        assert len(set(shapes)) == 3
        assert shapes[::2] == shapes[1::2]
        with pytest.raises(RuntimeError, match="power cut"):
            run_distill(cache, tmp_path / "out", **settings)
        reset_accelerate()
    out = run_distill(cache, tmp_path / "out", **settings)
    expected, found = state_dict_of(whole / "unet"), state_dict_of(out / "unet")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert [line["task"] for line in metrics(out)] == [line["task"] for line in metrics(whole)]


def test_losses_are_those_of_each_shape_alone(cache, tmp_path):
    """The loss of a batch against F.mse_loss of what the student gives for its entries one by one."""
    _, training = prepared(cache, tmp_path / "student", level="sd_small")
    dataset = training.dataset
    entries = [dataset[5], dataset[6]]
    batch = dataset.collate(entries)
    assert batch.latents.shape == (2, 4, 12, 20)
    noisy = DDPMScheduler.from_config(dataset.spec["noise_scheduler"]).add_noise(
        batch.latents.float(), batch.noise.float(), batch.timesteps
    )
    with torch.no_grad(), training.taps.recording(noisy) as features:
        prompts = batch.conditioning["prompt_embeds"].float()
        prediction = training.student(noisy, batch.timesteps, prompts).sample
        terms = training.objective.losses(batch, prediction, features, training.alphas_cumprod, "epsilon")
    expected = torch.stack([(p - n.float()).square().mean() for p, n in zip(prediction, batch.noise, strict=True)])
    torch.testing.assert_close(terms["task"], expected.mean())


def fp32(entry, names):
    return [torch.tensor(entry.tensors[name].values)[None].float() for name in names]


def test_held_out_errors_are_those_of_each_image_alone(teacher, student, held_out, tmp_path):
    """While a student is trained, and by `evaluate`; with diffusers' own U-Nets, one image after another."""
    entries = read_entries(held_out, "latents", ["latents", "prompt_embeds"])
    assert [stem(entry) for entry in entries] == list(CUT)
    unets = [UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval() for folder in (teacher, student)]
    scheduler = DDPMScheduler.from_pretrained(teacher, subfolder="scheduler")
    tasks, outputs = [], []
    for place, entry in enumerate(entries):
        (latents, prompts), name = fp32(entry, ["latents", "prompt_embeds"]), entry.meta["source_id"]
        noise = torch.from_numpy(draws.noise(0, name, 0, tuple(latents.shape[1:]), 0.0))[None].float()
        alone = draws.generator(0, name, 0, "held-out")
        timestep = torch.tensor([int((place + alone.random()) / len(entries) * 1000)])
        with torch.no_grad():
            prediction = unets[1](scheduler.add_noise(latents, noise, timestep), timestep, prompts).sample
            tasks.append((prediction - noise).square().mean().item())
            timestep = torch.tensor([draws.generator(0, name, 0, "held-out").integers(0, 1000)])
            noisy = scheduler.add_noise(latents, noise, timestep)
            expected, found = (unet(noisy, timestep, prompts).sample for unet in unets)
            outputs.append((found - expected).square().mean().item())
    *_, line = [line for line in metrics(student) if "held_out/task" in line]
    assert line["step"] == 2
    assert line["held_out/task"] == pytest.approx(np.mean(tasks), rel=1e-3)
    arguments = ["--teacher", teacher, "--student", student, "--latents", held_out, "--out", tmp_path / "out"]
    quick = ["--bins", 1, "--batch-size", 2, "--repeats", 1, "--num-inference-steps", 2, "--timing-batch-size", 1]
    given = ["evaluate", *arguments, *quick, "--device", "cpu"]
    result = CliRunner().invoke(main, [str(argument) for argument in given])
    reset_accelerate()
    assert result.exit_code == 0, result.output
    fidelity = json.loads((tmp_path / "out" / "evaluation.json").read_text())["fidelity"]
    assert fidelity["entries"] == 7
    assert fidelity["all"]["output"]["mse"] == pytest.approx(np.mean(outputs), rel=1e-3)


def test_two_processes_train_as_one_of_twice_the_batch(cache, student, tmp_path):
    """The student's two steps. Where a gradient is next to nothing, Adam makes a whole step of its rounding."""
    options = "--level sd_small --learning-rate 1e-3 --device cpu --dataloader-num-workers 0 --logging-steps 1 "
    options += "--no-report --max-train-steps 2 --train-batch-size 1"
    in_two_processes([f"distill --cache {cache} --out together {options}"], tmp_path)
    together = tmp_path / "together"
    terms = ("task", "output", "loss")
    pairs = zip(metrics(together), [line for line in metrics(student) if "loss" in line], strict=True)
    for line, alone in pairs:
        assert [line[name] for name in terms] == pytest.approx([alone[name] for name in terms], rel=1e-4)
    left, right = state_dict_of(together / "unet"), state_dict_of(student / "unet")
    errors = torch.cat([(left[name] - right[name]).flatten().abs() for name in left])
    assert errors.max() < 4e-3
    assert (errors < 1e-5).float().mean() > 0.99


def test_finetune_draws_anew_at_each_visit_and_held_out_images_may_have_all_shapes(
    teacher, latents, held_out, tmp_path
):
    settings = FinetuneSettings(
        model=str(teacher), latents=latents, out=tmp_path / "out", train_batch_size=2, max_train_steps=2, device="cpu",
        dataloader_num_workers=0, validation_latents=held_out, report=False,
    )  # fmt: skip
    finetune.run(settings)
    reset_accelerate()
    assert "held_out/task" in metrics(tmp_path / "out")[-1]
    dataset = LatentsDataset(latents)
    read = finetune.batches(settings, dataset, Accelerator(cpu=True), 0, 1000)
    seen = [pair for batch in itertools.islice(read, 30) for pair in zip(batch.keys, batch.timesteps, strict=True)]
    for key, visits in itertools.groupby(sorted((key, int(timestep)) for key, timestep in seen), lambda pair: pair[0]):
        assert len(set(visits)) > 4, key
    later = next(finetune.batches(settings, dataset, Accelerator(cpu=True), 2 * 20, 1000))
    assert list(zip(later.keys, later.timesteps.tolist(), strict=True)) == [(k, int(t)) for k, t in seen[40:42]]
    batches = list(batches_of_latents(ShardSet(open_store(latents), "latents"), 1000, 0))
    assert [tuple(batch.latents.shape) for batch in batches] == [(2, 4, 20, 12), (2, 4, 16, 16), (3, 4, 12, 20)]


def test_sdxl_states_the_size_the_crop_and_the_bucket_of_each_image(xl_teacher, data, tmp_path):
    latents = encoded(xl_teacher, data, tmp_path / "latents", random_flip=True, max_samples=3, seed=6)
    found = {stem(entry): entry for entry in read_entries(latents, "latents", ["latents", "time_ids"])}
    assert len({CUT[name] for name in found}) == 2
    for name, entry in found.items():
        crop, (height, width) = entry.meta["crop"], CUT[name]
        original = FILES[name][::-1] if name != "a.jpg" else FILES[name]
        left = crop["resized"][0] - width - crop["left"] if crop["flip"] else crop["left"]
        assert entry.tensors["time_ids"].values.tolist() == [*original, crop["top"], left, height, width]
    cache = run_teacher_cache(xl_teacher, latents, tmp_path / "cache", **{**ONE_ROUND, "students": ("vega",)})
    joined = {stem(entry): entry for entry in read_entries(cache, "cache", ["time_ids", "teacher_pred"])}
    for name, entry in joined.items():
        assert entry.tensors["teacher_pred"].values.shape == (4, CUT[name][0] // 2, CUT[name][1] // 2)
        assert (entry.tensors["time_ids"].values == found[name].tensors["time_ids"].values).all()
