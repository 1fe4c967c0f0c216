"""The images of a cache: stored once, linked or copied, its own for good, and noticed when they are others."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
from PIL import Image
from support import sidecars
from support.damage import flip, verify
from support.stages import read_entries, reset_accelerate, run_distill, run_encode, run_teacher_cache, tree
from support.tiny import write_images

from pipeline.commands import finetune, inspect_shards, teacher_cache
from pipeline.commands.finetune import FinetuneSettings
from pipeline.settings.inspect_shards import InspectSettings
from pipeline.system.errors import UserError
from pipeline.teacher_cache import TeacherCacheSettings
from shards.cache import Cache, stored_calibrations
from shards.kept import Kept, keep
from shards.manifest import read_manifest
from shards.schema import ShardError
from shards.sidecar import read_sidecar
from shards.store import open_store

EVERYTHING = ["latents", "prompt_embeds", "noise", "teacher_pred"]


@pytest.fixture(scope="module")
def latents(teacher, tmp_path_factory):
    work = tmp_path_factory.mktemp("images-of-a-cache")
    return run_encode(teacher, write_images(work / "data", 7), work / "latents", entries_per_shard=3)


@pytest.fixture(scope="module")
def cache(teacher, latents):
    return cached(teacher, latents, latents.parent / "cache")


def cached(teacher, latents, out, **changes):
    return run_teacher_cache(teacher, latents, out, **{"entries_per_shard": 3, "uncond_fraction": 0.4, **changes})


def images_in(directory):
    return {name: data for name, data in tree(directory).items() if name.startswith(("s0", "empty_", "manifest"))}


def change_an_image(sidecar):
    """Let a shard of latents state another first image, as after it was replaced and encoded again."""
    head, table = sidecars.load(sidecar)
    table[0, 1] ^= 1
    sidecars.save(sidecar, head, table)


def test_they_are_what_encode_wrote_and_the_tars_are_links(latents, cache):
    assert images_in(cache / "images") == images_in(latents)
    for path in (cache / "images").iterdir():
        assert os.path.samefile(path, latents / path.name) == (path.suffix == ".tar")


def test_latents_that_are_overwritten_in_place_are_noticed(teacher, latents, tmp_path):
    """As `cp` and some ways to restore a backup do: the link shows the new content too."""
    own = shutil.copytree(latents, tmp_path / "latents")
    out = cached(teacher, own, tmp_path / "cache")
    others = run_encode(teacher, write_images(tmp_path / "data", 7, seed=1), tmp_path / "others", entries_per_shard=3)
    for name in ("s00001.tar", "s00001.index"):
        (own / name).write_bytes((others / name).read_bytes())
    for rounds in (2, 3):
        with pytest.raises(
            UserError, match=r"s00001.tar changed after .* in place, and the cache's own images with it"
        ):
            cached(teacher, own, out, rounds=rounds)
        reset_accelerate()
    for name in ("s00001.tar", "s00001.index"):
        (own / name).write_bytes((latents / name).read_bytes())
    cached(teacher, own, out, rounds=3)
    assert verify(out, "--full")[0] == 0


def test_on_another_disk_they_are_copies(teacher, latents, cache, tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)

    monkeypatch.setattr(os, "link", link)
    out = cached(teacher, latents, tmp_path / "cache")
    assert tree(out / "images") == tree(cache / "images")
    assert not any(os.path.samefile(path, latents / path.name) for path in (out / "images").iterdir())
    assert verify(out, "--full")[0] == 0


def test_a_cache_needs_its_latents_no_longer(teacher, latents, cache, tmp_path):
    own = tmp_path / "latents"
    shutil.copytree(latents, own)
    out = cached(teacher, own, tmp_path / "cache")
    shutil.rmtree(own)
    run_distill(out, tmp_path / "student", max_train_steps=1)
    # Its images are latents like any other.
    cached(teacher, out / "images", tmp_path / "second")
    assert tree(tmp_path / "second" / "images") == tree(out / "images")
    data = [json.loads((place / "origin.json").read_text())["data"] for place in (out, tmp_path / "second")]
    assert data[0] == data[1] != {}
    settings = {"train_batch_size": 2, "max_train_steps": 1, "device": "cpu", "report": False}
    finetune.run(FinetuneSettings(model=str(teacher), latents=out / "images", out=tmp_path / "tuned", **settings))
    reset_accelerate()


def test_an_unconditional_entry_has_the_empty_prompt_and_the_caption_of_its_image(latents, cache):
    images = {entry.meta["source_id"]: entry for entry in read_entries(latents, "latents", EVERYTHING[:2])}
    empty = Cache(open_store(cache))._empty["prompt_embeds"]
    entries = read_entries(cache, "cache", EVERYTHING)
    assert {entry.meta["unconditional"] for entry in entries} == {True, False}
    for entry in entries:
        image = images[entry.meta["source_id"]]
        expected = empty if entry.meta["unconditional"] else image.tensors["prompt_embeds"].values
        assert (entry.tensors["prompt_embeds"].values == expected).all()
        assert (entry.tensors["latents"].values == image.tensors["latents"].values).all()
        assert entry.meta["caption"] == image.meta["caption"]


def test_other_latents_are_refused_with_the_difference(teacher, latents, cache):
    before = tree(cache)
    others = run_encode(teacher, latents.parent / "data", latents.parent / "others", entries_per_shard=3, seed=5)
    with pytest.raises((UserError, ShardError), match=r"seed: 0 -> 5"):
        cached(teacher, others, cache)
    reset_accelerate()
    assert tree(cache) == before


def test_a_damaged_image_is_kept_and_taken_again_when_it_is_deleted(teacher, latents, cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    tar = copy / "images" / "s00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    status, output = verify(copy, "--remove-damaged")
    assert status == 2
    assert f"{tar} is damaged" in output
    assert "or delete its .tar and .index and rerun `distill-sd teacher-cache` with the latents that" in output
    for name in ("s00001.tar", "s00001.index"):
        (copy / "images" / name).unlink()
    with pytest.raises(ShardError, match=r"Missing shards: 1 of 3, from s00001.tar on. Rerun .*teacher-cache"):
        Cache(open_store(copy))
    told = f"{tar} is missing although later shards exist. If no job is still writing it, rerun the same"
    assert f"{told} `distill-sd teacher-cache`" in verify(copy)[1]
    cached(teacher, latents, copy)
    assert tree(copy) == tree(cache)


def test_an_image_that_is_damaged_in_the_latents_too_fills_no_gap(teacher, latents, tmp_path):
    """The two are one file, so deleting the cache's name does not help."""
    own = shutil.copytree(latents, tmp_path / "latents")
    out = cached(teacher, own, tmp_path / "cache")
    flip(own / "s00001.tar", 700)
    assert verify(out, "--full")[0] == 2
    for name in ("s00001.tar", "s00001.index"):
        (out / "images" / name).unlink()
    with pytest.raises(UserError, match=r"s00001.tar is damaged, so it cannot be put into .*Run `distill-sd verify"):
        cached(teacher, own, out)
    reset_accelerate()
    # No other shard is left either.
    for path in (out / "images").glob("s0*"):
        path.unlink()
    with pytest.raises(UserError, match=r"s00001.tar is damaged, so it cannot be put into"):
        cached(teacher, own, out)
    reset_accelerate()


def test_latents_may_be_links_into_another_folder(teacher, latents, tmp_path):
    """As a model hub's folders are."""
    links = tmp_path / "links"
    links.mkdir()
    for path in latents.iterdir():
        (links / path.name).symlink_to(os.path.relpath(path, links))
    out = cached(teacher, links, tmp_path / "cache", rounds=1)
    assert not any(path.is_symlink() for path in (out / "images").iterdir())
    assert images_in(out / "images") == images_in(latents)


def test_rounds_are_added_from_the_caches_own_images(teacher, latents, cache, tmp_path):
    own = shutil.copytree(latents, tmp_path / "latents")
    out = cached(teacher, own, tmp_path / "cache", rounds=1)
    shutil.rmtree(own)
    cached(teacher, out / "images", out, rounds=2)
    assert {name for name in tree(out) if name.endswith(".tar")} == {
        name for name in tree(cache) if name.endswith(".tar")
    }
    assert verify(out, "--full")[0] == 0


def test_an_image_that_was_replaced_before_anything_was_made_from_it_is_taken(teacher, tmp_path):
    data = write_images(tmp_path / "data", 4)
    own = run_encode(teacher, data, tmp_path / "latents", entries_per_shard=2)
    out = cached(teacher, own, tmp_path / "cache", rounds=1)
    for path in [*out.glob("r0*"), *own.glob("s00000.*")]:
        path.unlink()
    Image.new("RGB", (50, 40), "red").save(data / "000.png")
    run_encode(teacher, data, own, entries_per_shard=2)
    cached(teacher, own, out, rounds=1)
    assert images_in(out / "images") == images_in(own)
    assert verify(out, "--full")[0] == 0


def test_the_images_of_a_cache_are_not_removed_by_themselves_either(teacher, cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    flip(copy / "images" / "s00001.tar", 2000)
    status, output = verify(copy / "images", "--full", "--remove-damaged")
    assert (status, "holds the images of a cache, which may be the only ones" in output) == (2, True)
    assert "or delete its .tar and .index and rerun `distill-sd teacher-cache`" in verify(copy / "images", "--full")[1]


def test_images_without_their_manifest_are_kept(teacher, latents, cache, tmp_path):
    """What is there stays; latents that were written again do not take its place."""
    copy, own = shutil.copytree(cache, tmp_path / "cache"), shutil.copytree(latents, tmp_path / "latents")
    (copy / "images" / "manifest.json").unlink()
    cached(teacher, own, copy)
    assert tree(copy) == tree(cache)
    (copy / "images" / "manifest.json").unlink()
    change_an_image(own / "s00001.index")
    with pytest.raises(UserError, match=r"s00001.tar changed after .* pass --latents .*cache/images\."):
        cached(teacher, own, copy)
    reset_accelerate()


def test_what_was_kept_of_another_image_is_made_again(teacher, tmp_path):
    data = write_images(tmp_path / "data", 4)
    own = run_encode(teacher, data, tmp_path / "latents", entries_per_shard=4)
    out = cached(teacher, own, tmp_path / "cache", rounds=1, entries_per_shard=4, batch_size=1)
    whole = tree(out)
    store, manifest = open_store(out), read_manifest(open_store(out))
    rows = [read_sidecar(store, "r0000-s00000.tar", manifest).row(place) for place in range(3)]
    rows[1] = replace(rows[1], image_crc32=5)
    with open(out / "r0000-s00000.tar", "rb") as written:
        keep(store, Kept("r0000-s00000.tar", tuple(rows), ()), manifest, written)
    (out / "r0000-s00000.index").unlink()
    cached(teacher, own, out, rounds=1, entries_per_shard=4, batch_size=1)
    assert tree(out) == whole


def test_calibrations_of_another_cache_are_not_adopted(teacher, latents, cache, tmp_path):
    out = cached(teacher, latents, tmp_path / "cache", seed=7, codec="fp32")
    shutil.copy(cache / "calibration.safetensors", out)
    manifest = read_manifest(open_store(cache))
    with pytest.raises(ShardError, match="calibration.safetensors is another cache's. Restore its own from a backup"):
        stored_calibrations(open_store(out), replace(manifest, spec={**manifest.spec, "seed": 7}))


def test_more_images_are_refused_with_the_difference_before_anything_is_deleted(teacher, tmp_path):
    """As after `encode --retry-skipped`."""
    data = write_images(tmp_path / "data", 5)
    sound = (data / "001.png").read_bytes()
    (data / "001.png").write_bytes(b"not an image")
    own = run_encode(teacher, data, tmp_path / "latents", entries_per_shard=2)
    out = cached(teacher, own, tmp_path / "cache", rounds=1)
    before = tree(out)
    (data / "001.png").write_bytes(sound)
    run_encode(teacher, data, own, entries_per_shard=2, retry_skipped=True)
    for act in (run_teacher_cache, planned):
        with pytest.raises(ShardError, match="entries: 4 -> 5"):
            act(teacher, own, out, entries_per_shard=3, uncond_fraction=0.4, rounds=1)
        reset_accelerate()
    assert tree(out) == before


def planned(teacher, latents, out, **changes):
    teacher_cache.plan(
        TeacherCacheSettings(teacher=str(teacher), latents=latents, out=out, tokens=16, device="cpu", **changes)
    )


def test_shards_of_another_calibration_are_refused(cache, tmp_path):
    """As when parts that were written without a common disk are put together."""
    copy = shutil.copytree(cache, tmp_path / "cache")
    head, table = sidecars.load(copy / "r0001-s00001.index")
    sidecars.save(copy / "r0001-s00001.index", head | {"calibration_sha256": "0" * 64}, table)
    with pytest.raises(
        ShardError, match=r"s00001.index was written with another calibration.safetensors than its manif"
    ):
        Cache(open_store(copy))
    assert verify(copy)[0] == 2


def test_lost_calibrations_are_not_learned_anew(teacher, latents, cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    content = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").unlink()
    # The file is still there, so a new manifest states the same.
    cached(teacher, latents, copy)
    assert (copy / "manifest.json").read_bytes() == content
    for name in ("manifest.json", "calibration.safetensors"):
        (copy / name).unlink()
    (copy / "r0000-s00000.index").unlink()
    with pytest.raises(ShardError, match=r"has shards, but the calibration.safetensors that they were written with is"):
        cached(teacher, latents, copy)
    reset_accelerate()


def test_a_cache_without_its_images_is_told_so(teacher, latents, cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    shutil.rmtree(copy / "images")
    for act in (
        lambda: run_distill(copy, tmp_path / "student"),
        lambda: inspect_shards.run(InspectSettings(directory=copy)),
    ):
        with pytest.raises(ShardError, match=r"lacks its images: there is no images/manifest.json. Copy images/ from"):
            act()
        reset_accelerate()
    status, output = verify(copy)
    assert (status, "lacks its images" in output) == (2, True)
    cached(teacher, latents, copy)
    assert tree(copy) == tree(cache)


def test_an_image_that_is_missing_and_was_encoded_otherwise_is_not_put_in_its_place(teacher, latents, cache, tmp_path):
    """The entries state which image they were made from."""
    copy, own = shutil.copytree(cache, tmp_path / "cache"), shutil.copytree(latents, tmp_path / "latents")
    for name in ("s00001.tar", "s00001.index"):
        (copy / "images" / name).unlink()
    change_an_image(own / "s00001.index")
    with pytest.raises(UserError, match=r"latents/s00001.tar changed after .*, or delete images/s00001.tar"):
        cached(teacher, own, copy)
    reset_accelerate()


def test_what_is_to_be_copied_counts_as_needed(teacher, latents, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(teacher_cache, "require_space", lambda out, size, remedy: sizes.append(size))
    for copied in (0, 10**12):
        monkeypatch.setattr("pipeline.cache.planned.bytes_to_copy", lambda *_, copied=copied, **__: copied)
        cached(teacher, latents, tmp_path / str(copied), rounds=1)
    assert sizes[1] - sizes[0] == 10**12


def test_a_dry_run_takes_nothing(teacher, latents, tmp_path):
    teacher_cache.plan(TeacherCacheSettings(teacher=str(teacher), latents=latents, out=tmp_path / "c", device="cpu"))
    assert not (tmp_path / "c").exists()
