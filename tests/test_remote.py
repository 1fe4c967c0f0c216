"""The commands work with sets in a bucket as with those in directories: same results, and errors that are sentences."""

import importlib
import json
import os
import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from PIL import Image
from support.buckets import EXPIRED, KEY, SECRET, Elsewhere, environment, fill, held
from support.stages import first, metrics, run_distill, run_encode, run_teacher_cache, tree
from support.tiny import write_images

from pipeline.cache import latents_spec
from pipeline.cache.latents import open_latents
from pipeline.cli import main
from pipeline.commands import distill, finetune, teacher_cache
from pipeline.commands.distill import DistillSettings
from pipeline.commands.finetune import FinetuneSettings
from pipeline.sampling.generate import GeneratedImages
from pipeline.system.errors import UserError
from pipeline.training.held_out import held_out_of
from pipeline.training.loader import collated_batches
from shards.dataset import CacheDataset
from shards.manifest import read_manifest
from shards.schema import ShardError
from shards.store import open_store

CACHE = "s3://bucket/cache"
MODULES = {"inspect": "inspect_shards"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where copies of what lies in a bucket are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def stored(cache, bucket, home):
    fill("cache", cache)
    return bucket


def run(*arguments):
    """A command's status and what it printed."""
    importlib.import_module(f"pipeline.commands.{MODULES.get(arguments[0], arguments[0])}")
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert KEY not in result.output
    assert SECRET not in result.output
    # Apart, since a bar's last newline may come after what is said next.
    printed = "\n".join([result.stdout, result.stderr])
    return result.exit_code, "".join(line for line in re.split(r"[\r\n]", printed) if "%|" not in line)


def without_times(out):
    return [{k: v for k, v in line.items() if "second" not in k} for line in metrics(out)]


def test_a_student_is_the_same_from_a_bucket_to_the_last_bit(cache, stored, home, tmp_path):
    here = run_distill(cache, tmp_path / "here", max_train_steps=2)
    there = run_distill(CACHE, tmp_path / "there", max_train_steps=2)
    own = ("distill.json", "metrics.jsonl", "checkpoints", "finished.json")
    a, b = ({k: v for k, v in tree(out).items() if not k.startswith(own)} for out in (here, there))
    assert a == b
    assert json.loads((there / "distill.json").read_text())["cache"] == CACHE
    assert without_times(here) == without_times(there)
    written = b"".join([*tree(there).values(), *tree(home).values()])
    assert KEY.encode() not in written
    assert SECRET.encode() not in written


def test_what_lies_beside_the_shards_is_downloaded_once_and_again_where_a_copy_is_damaged(stored, home, tmp_path):
    settings = DistillSettings(cache=CACHE, level="sd_small", out=tmp_path / "out")
    dataset = distill.open_cache(settings)

    def downloads():
        stored.requests.clear()
        distill.take_parts(settings, dataset)
        return {
            name for name in ("base/unet", "base/vae", "sd_small", "sd_tiny", ".tar") if name in str(stored.requests)
        }

    assert downloads() == {"base/vae", "sd_small"}
    assert downloads() == set()
    (weights,) = home.rglob("vae/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert downloads() == {"base/vae"}
    shutil.rmtree(home)
    store = open_store(CACHE)
    with store.write("base/vae/config.json") as stream:
        stream.write(b"{}")
    with pytest.raises(UserError, match=f"{CACHE}/base: vae/config.json was changed. Copy it from an intact cache"):
        downloads()
    store.delete("students/sd_small/checksums.json")
    with pytest.raises(UserError, match=f"{CACHE}/students/sd_small: checksums.json is missing"):
        distill.take_part(store, dataset.cache.manifest, "students/sd_small", home)
    assert list(home.rglob("*.safetensors")) == []
    with pytest.raises(UserError, match="has no initial weights of bk_small"):
        distill.take_part(store, dataset.cache.manifest, "students/bk_small", home)


def test_batches_from_a_bucket_are_read_in_another_process_also_on_a_cpu(cache, stored, tmp_path):
    settings = DistillSettings(cache=CACHE, level="sd_small", out=tmp_path, train_batch_size=4, device="cpu")
    here, there = (CacheDataset(open_store(place), ["mid_block"]) for place in (cache, CACHE))
    elsewhere = Elsewhere(there, environment(stored))
    batches = collated_batches(settings, elsewhere, Accelerator(cpu=True), 0)
    for (batch, process), expected in zip(
        first(batches, 3), distill.batches(settings, here, Accelerator(cpu=True), 0), strict=False
    ):
        assert process != os.getpid()
        assert batch.keys == expected.keys
        assert torch.equal(batch.latents, expected.latents)
    stored.fail("GET .*tar", status=403, body=EXPIRED)
    with pytest.raises(PermissionError, match="access was denied") as caught:
        first(batches, 50)
    assert caught.value.filename.startswith(CACHE)


def test_verify_and_inspect_say_of_a_bucket_what_they_say_of_a_directory(cache, stored):
    for command in (["verify"], ["verify", "--full"], ["inspect"]):
        status, here = run(*command, cache)
        assert (status, here.replace(str(cache), CACHE)) == run(*command, CACHE)
    assert stored.most > 1
    status, output = run("verify", f"{CACHE}/images")
    assert (status, "no damage found" in output) == (0, True)


def test_verify_finds_damage_in_a_bucket_and_removes_it(cache, stored):
    store = open_store(CACHE)
    damaged = bytearray((cache / "r0001-s00001.tar").read_bytes())
    damaged[3000] ^= 1
    for name, data in (("r0001-s00001.tar", damaged), ("base/vae/config.json", b"{}"), ("origin.json", b"[")):
        with store.write(name) as stream:
            stream.write(data)
    status, output = run("verify", CACHE, "--full", "--remove-damaged")
    assert status == 2
    assert f"{CACHE}/r0001-s00001.tar is damaged" in output
    assert f"{CACHE}/base: vae/config.json was changed" in output
    assert f"{CACHE}/origin.json is corrupt" in output
    assert not store.exists("r0001-s00001.index")
    assert store.exists("r0001-s00000.index")


def test_held_out_latents_may_lie_in_a_bucket(cache, stored, tmp_path):
    address = f"{CACHE}/images"
    assert len(open_latents(DistillSettings(cache=address, level="sd_small", out=tmp_path).cache)) == 13
    errors, spec = [], read_manifest(open_store(address)).spec
    for place in (cache / "images", address):
        settings = DistillSettings(cache=cache, level="sd_small", out=tmp_path, validation_latents=place)
        (batch, *_) = held_out_of(settings, {**spec, "seed": 1}, 1000).batches
        errors.append(batch)
    assert torch.equal(errors[0].latents, errors[1].latents)
    assert errors[0].keys == errors[1].keys


def test_a_model_is_finetuned_from_a_bucket_as_from_a_directory(teacher, cache, stored, tmp_path):
    quick = {"max_train_steps": 2, "train_batch_size": 3, "device": "cpu", "report": False, "dataloader_num_workers": 0}
    for out, latents in {"here": cache / "images", "there": f"{CACHE}/images"}.items():
        finetune.run(FinetuneSettings(model=str(teacher), latents=latents, out=tmp_path / out, **quick))
    a, b = (tree(tmp_path / out / "unet") for out in ("here", "there"))
    assert a == b
    assert json.loads((tmp_path / "there" / "finetune.json").read_text())["latents"] == f"{CACHE}/images"


@pytest.mark.parametrize(
    ("fault", "said"),
    [({"kind": "cut"}, "tries failed"), ({"status": 403, "body": EXPIRED}, "access was denied")],
)
def test_a_store_that_fails_ends_a_command_with_a_sentence(stored, tmp_path, fault, said):
    stored.fail("GET .*index", **fault)
    train = ("distill", "--cache", CACHE, "--level", "sd_small", "--out", tmp_path / "out", "--device", "cpu")
    for command in (train, ("verify", CACHE), ("inspect", CACHE)):
        status, output = run(*command)
        assert status == 2
        assert said in output
        assert "s3://bucket/cache/" in output
        assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


LATENTS, OUT = "s3://bucket/latents", "s3://bucket/out"


def alike(directory, name):
    """Whether the bucket holds below `name` what a directory holds, but for the options, which name the places."""
    there, options = held(name), ("encode.json", "teacher-cache.json", "images/encode.json")
    here = {key: data for key, data in tree(directory).items() if key not in options}
    return here == {key: data for key, data in there.items() if key not in options}


@pytest.fixture
def drawn(monkeypatch):
    """The teacher's samples are drawn by nobody."""
    picture = GeneratedImages([Image.new("RGB", (8, 8))], ["a tree"], 1.0, 1, "cpu")
    monkeypatch.setattr(teacher_cache, "generate_in_process", lambda *_, **__: picture)


def test_both_parts_of_stage_one_write_to_a_bucket_what_they_write_to_a_directory(
    teacher, images, bucket, home, drawn, tmp_path
):
    latents = run_encode(teacher, images, tmp_path / "latents")
    run_encode(teacher, images, LATENTS)
    assert alike(latents, "latents")
    cache = run_teacher_cache(teacher, latents, tmp_path / "cache", samples=1)
    run_teacher_cache(teacher, LATENTS, OUT, samples=1)
    assert alike(cache, "out")
    puts = [request.split("/")[-1] for request in bucket.requests if request.startswith("PUT")]
    assert puts.count("r0000-s00000.tar") == 1
    assert SECRET.encode() not in b"".join(held("out").values())
    bucket.requests.clear()
    run_teacher_cache(teacher, LATENTS, OUT, samples=1)
    run_encode(teacher, images, LATENTS)
    assert [request for request in bucket.requests if "PUT" in request] == ["PUT /bucket/latents/skipped.jsonl"]
    from_bucket = run_teacher_cache(teacher, LATENTS, tmp_path / "from_bucket", samples=1)
    assert tree(from_bucket).keys() == tree(cache).keys()
    assert alike(from_bucket, "out")


def test_images_of_several_shapes_and_other_taps_are_the_same_in_a_bucket(
    sides_in_steps_of_eight, teacher, bucket, home, tmp_path, monkeypatch
):
    """Of a tall, a square and a wide image, in three shards. A second run knows their shapes from what the first one
    wrote."""
    images = write_images(tmp_path / "images", 3, sizes=((60, 36), (40, 40), (36, 60)))
    latents = run_encode(teacher, images, tmp_path / "latents", buckets=True)
    run_encode(teacher, images, LATENTS, buckets=True)
    assert alike(latents, "latents")
    assert "buckets.npy" in held("latents")
    monkeypatch.setattr(latents_spec, "assign", None)
    run_encode(teacher, images, LATENTS, buckets=True)
    options = {"rounds": 1, "students": ("sd_small",), "taps": "self-attention"}
    cache = run_teacher_cache(teacher, latents, tmp_path / "cache", **options)
    run_teacher_cache(teacher, LATENTS, OUT, **options)
    assert alike(cache, "out")
    names = json.loads(held("out")["manifest.json"])["spec"]["taps"]
    assert names
    assert all(name.endswith(".attn1") for name in names)
    status, output = run("verify", OUT, "--full")
    assert (status, "no damage found; 3 of 3 shards" in output) == (0, True)
    training = {"train_batch_size": 1, "max_train_steps": 2}
    here, there = (run_distill(place, tmp_path / str(number), **training) for number, place in enumerate((cache, OUT)))
    assert without_times(here) == without_times(there)


def test_a_cache_in_a_bucket_goes_on_where_a_failure_stopped_it(teacher, latents, bucket, tmp_path):
    bucket.fail("PUT .*r0001-s00000.tar$")
    with pytest.raises(OSError, match="tries failed"):
        run_teacher_cache(teacher, latents, OUT)
    assert "r0000-s00001.index" in held("out")
    assert not [name for name in held("out") if name.startswith("r0001")]
    bucket.reset()
    run_teacher_cache(teacher, latents, OUT)
    assert not [request for request in bucket.requests if "PUT" in request and "r0000" in request]
    assert alike(run_teacher_cache(teacher, latents, tmp_path / "cache"), "out")


def test_an_address_is_refused_as_a_directory_would_be(teacher, latents, images, bucket):
    fill("latents", latents)
    with pytest.raises(ShardError, match="s3://bucket/latents was made with other settings"):
        run_encode(teacher, images, LATENTS, seed=1)
    with pytest.raises(UserError, match="--out s3://bucket/latents holds the output of `encode`"):
        run_teacher_cache(teacher, latents, LATENTS)
    with pytest.raises(UserError, match="--out s3://bucket/latents is --latents s3://bucket/latents, or lies in it"):
        run_teacher_cache(teacher, LATENTS, LATENTS)
    fill("other", images)
    with pytest.raises(UserError, match="--out s3://bucket/other holds .* more, which `encode` did not write"):
        run_encode(teacher, images, "s3://bucket/other")
    with pytest.raises(UserError, match="--out https://host/out is on a web server, which can only be read"):
        run_encode(teacher, images, "https://host/out")
    assert not [request for request in bucket.requests if "PUT" in request]
