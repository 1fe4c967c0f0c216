"""encode: what lands in the latents, against diffusers' own networks; skipping; resuming; repeating."""

import json
import shutil
import tarfile

import datasets
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.stages import read_entries, reset_accelerate, run_encode, shard_files, tree
from support.tiny import tiny_pipeline, write_images

from pipeline.cache import sizes
from pipeline.cache.planned import latents_sizes
from pipeline.commands import encode
from pipeline.core import draws
from pipeline.data.images import decode, framed
from pipeline.encode import EncodeSettings
from pipeline.system.disk import format_bytes
from pipeline.system.errors import UserError
from shards.codec import decode_npy
from shards.schema import ShardError
from shards.sidecar import read_sidecar
from shards.store import open_store


def test_latents_are_the_vaes_posterior_sample_scaled(teacher, images, latents):
    """Against the VAE itself: mean + std * the image's own noise, times the scaling factor, in fp16."""
    pipe = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    for sample in read_entries(latents, "latents", ["latents"]):
        name = sample.meta["source_id"]
        pixels, crop = framed(
            decode((images / name).read_bytes()),
            (32, 32),
            center_crop=False,
            random_flip=False,
            draw=draws.generator(0, name, 0, "crop"),
        )
        assert sample.meta["crop"] == crop.as_json()
        with torch.no_grad():
            image = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
            posterior = pipe.vae.encode(image).latent_dist
        noise = torch.from_numpy(draws.standard_normal(0, name, 0, "posterior", (4, 16, 16)))
        expected = (posterior.mean + posterior.std * noise) * pipe.vae.config.scaling_factor
        torch.testing.assert_close(
            torch.from_numpy(sample.tensors["latents"].values).float(), expected[0], rtol=2e-3, atol=1e-3
        )


def test_prompt_embeds_are_those_of_the_diffusers_pipeline(teacher, latents):
    pipe = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    for sample in read_entries(latents, "latents", ["prompt_embeds"]):
        assert sample.meta["caption"] == f"picture {int(sample.meta['source_id'][:3])}"
        with torch.no_grad():
            expected, empty = pipe.encode_prompt(sample.meta["caption"], "cpu", 1, True, "")
        stored = torch.from_numpy(sample.tensors["prompt_embeds"].values).float()
        torch.testing.assert_close(stored, expected[0], rtol=2e-3, atol=1e-3)
    stored_empty = torch.from_numpy(decode_npy((latents / "empty_prompt_embeds.npy").read_bytes())).float()
    torch.testing.assert_close(stored_empty, empty[0], rtol=2e-3, atol=1e-3)


def test_a_teacher_stored_in_fp16_runs_in_the_chosen_precision(images, tmp_path):
    half = tiny_pipeline().to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    latents = run_encode(tmp_path / "half", images, tmp_path / "latents")
    with torch.no_grad():
        expected, empty = half.to(torch.float32).encode_prompt("picture 3", "cpu", 1, True, "")
    stored = read_entries(latents, "latents", ["prompt_embeds"])[3].tensors["prompt_embeds"].values
    np.testing.assert_array_equal(stored, expected[0].half().numpy())
    np.testing.assert_array_equal(np.load(latents / "empty_prompt_embeds.npy"), empty[0].half().numpy())


def test_every_image_is_there_once_in_sorted_order(latents):
    found = read_entries(latents, "latents", [])
    assert [s.meta["source_id"] for s in found] == [f"{i:03d}.png" for i in range(13)]
    assert [s.key for s in found] == [f"{i:09d}" for i in range(13)]


def test_two_runs_write_the_same_bytes(teacher, images, latents, tmp_path):
    again = run_encode(teacher, images, tmp_path / "again", workers=1)
    assert shard_files(again) == shard_files(latents)


def test_batch_sizes_change_nothing_but_rounding(teacher, images, tmp_path):
    one = read_entries(
        run_encode(teacher, images, tmp_path / "1", batch_size=1), "latents", ["latents", "prompt_embeds"]
    )
    seven = read_entries(
        run_encode(teacher, images, tmp_path / "7", batch_size=7), "latents", ["latents", "prompt_embeds"]
    )
    assert [(s.key, s.meta) for s in one] == [(s.key, s.meta) for s in seven]
    for a, b in zip(one, seven, strict=True):
        for name in ("latents", "prompt_embeds"):
            np.testing.assert_allclose(a.tensors[name].values, b.tensors[name].values, rtol=2e-3, atol=2e-3)


def test_bad_images_are_skipped_listed_and_counted(teacher, tmp_path, capsys):
    data = write_images(tmp_path / "data", 7)
    (data / "001.png").write_bytes(b"no picture")
    (data / "004.png").unlink()
    (data / "005.png").write_bytes((data / "005.png").read_bytes()[:500])
    with open(data / "metadata.jsonl", "a") as stream:
        stream.write(json.dumps({"file_name": "006.png", "text": None}) + "\n")
    out = run_encode(teacher, data, tmp_path / "out", max_skipped=0.7)
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [item["source_id"] for item in skipped] == ["001.png", "004.png", "005.png", "006.png#2"]
    assert "not decodable" in skipped[0]["reason"]
    assert "No such file" in skipped[1]["reason"]
    assert "caption" in skipped[3]["reason"]
    assert "holds 4 images in 2 shards" in capsys.readouterr().out
    assert [s.meta["source_id"] for s in read_entries(out, "latents", [])] == [
        "000.png",
        "002.png",
        "003.png",
        "006.png",
    ]


def test_no_readable_image_is_an_error_that_names_the_file_of_reasons(teacher, tmp_path):
    data = write_images(tmp_path / "data", 2)
    for path in data.glob("*.png"):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the images could be read.*skipped.jsonl"):
            run_encode(teacher, data, tmp_path / "out", max_skipped=1.0)


def test_a_run_that_loses_most_of_its_input_stops_and_keeps_what_it_has(teacher, tmp_path):
    data = write_images(tmp_path / "data", 10)
    for number in (6, 7, 9):
        (data / f"{number:03d}.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"(?s)3 of the first 5 images .* more than --max-skipped.*\n  006.png: not dec"
    ):
        run_encode(teacher, data, tmp_path / "out", max_skipped=0.5)
    reset_accelerate()
    assert sorted(path.name for path in (tmp_path / "out").glob("s0*")) == ["s00000.index", "s00000.tar"]
    out = run_encode(teacher, data, tmp_path / "out", max_skipped=0.6)
    assert len(read_entries(out, "latents", [])) == 7


def test_skipped_images_that_can_be_read_now_are_encoded(teacher, images, tmp_path, capsys):
    data = write_images(tmp_path / "data", 13)
    good = {name: (data / name).read_bytes() for name in ("003.png", "004.png", "008.png")}
    (data / "003.png").unlink()
    (data / "004.png").write_bytes(b"")
    (data / "008.png").write_bytes(b"")
    out = run_encode(teacher, data, tmp_path / "out")
    before = shard_files(out)
    (data / "003.png").write_bytes(good["003.png"])
    run_encode(teacher, data, out)
    assert shard_files(out) == before
    run_encode(teacher, data, out, retry_skipped=True)
    assert "rewriting s00000.tar: 1 of its 2 skipped images" in capsys.readouterr().out
    after = shard_files(out)
    assert {name for name in after if after[name] != before[name]} == {"s00000.tar", "s00000.index"}
    assert [json.loads(line)["source_id"] for line in (out / "skipped.jsonl").read_text().splitlines()] == [
        "004.png",
        "008.png",
    ]
    for name, data_of in good.items():
        (data / name).write_bytes(data_of)
    assert shard_files(run_encode(teacher, data, out, retry_skipped=True)) == shard_files(
        run_encode(teacher, images, tmp_path / "undisturbed")
    )


def test_views_are_other_crops_of_the_same_image(teacher, images, tmp_path):
    plain = read_entries(run_encode(teacher, images, tmp_path / "1"), "latents", ["latents"])
    out = run_encode(teacher, images, tmp_path / "3", views=3, random_flip=False)
    three = read_entries(out, "latents", ["latents"])
    assert [s.meta["source_id"] for s in three[:4]] == ["000.png", "000.png@2", "000.png@3", "001.png"]
    for one, first in zip(plain, three[::3], strict=True):
        assert one.meta == first.meta
        np.testing.assert_allclose(one.tensors["latents"].values, first.tensors["latents"].values, atol=2e-3)
    wide = [s.meta["crop"] for s in three if s.meta["crop"]["resized"] != [32, 32]]
    assert len({(crop["left"], crop["top"]) for crop in wide}) > 3
    with pytest.raises(UserError, match="--views 2 with --center-crop gives the same pixels"):
        run_encode(teacher, images, tmp_path / "2", views=2, center_crop=True)


def test_truncated_captions_are_counted(teacher, images, tmp_path, capsys):
    data = write_images(tmp_path / "data", 4)
    rows = [
        {"file_name": f"{i:03d}.png", "text": text} for i, text in enumerate(("abcdef", "abcdefg", "a " * 5000, "é"))
    ]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_encode(teacher, data, tmp_path / "out")
    # The tokenizer gives a letter a token, and takes eight with begin and end.
    assert "note: 2 of 4 captions exceed 8 tokens and were truncated" in capsys.readouterr().out


def test_odd_captions_come_through_as_they_are(teacher, tmp_path):
    odd = [
        "\u202eright to left",
        "e\u0301 combined",
        "nul\x00 inside",
        "two\nlines\ttab",
        "🏳️‍🌈 flag",
        "\ufeffmark",
        "x" * 10_000,
    ]
    data = write_images(tmp_path / "data", len(odd))
    rows = [{"file_name": f"{i:03d}.png", "text": caption} for i, caption in enumerate(odd)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run_encode(teacher, data, tmp_path / "out")
    assert [sample.meta["caption"] for sample in read_entries(out, "latents", ["prompt_embeds"])] == odd


def test_every_source_gives_the_same_tensors_for_the_same_images(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "library")
    folder = write_images(tmp_path / "folder", 13)
    rows = sorted(
        map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()), key=lambda row: row["file_name"]
    )
    texts = tmp_path / "texts"
    texts.mkdir()
    (tmp_path / "tars").mkdir()
    for first in range(0, 13, 5):
        with tarfile.open(tmp_path / "tars" / f"{first // 5:05d}.tar", "w") as tar:
            for row in rows[first : first + 5]:
                shutil.copy(folder / row["file_name"], texts)
                caption = (texts / row["file_name"]).with_suffix(".txt")
                caption.write_text(row["text"])
                tar.add(folder / row["file_name"], row["file_name"])
                tar.add(caption, caption.name)
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    columns = {"image": [str(folder / row["file_name"]) for row in rows], "text": [row["text"] for row in rows]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.load_from_disk(tmp_path / "saved").to_parquet(tmp_path / "data.parquet")
    sources = [
        folder,
        texts,
        tmp_path / "tars",
        tmp_path / "tars" / "{00000..00002}.tar",
        tmp_path / "saved",
        tmp_path / "data.parquet",
    ]
    written = [
        shard_files(run_encode(teacher, data, tmp_path / f"out{i}", random_flip=True)) for i, data in enumerate(sources)
    ]
    for data, shards in zip(sources, written, strict=True):
        assert shards == written[0], data


def test_a_finished_output_is_left_alone_and_reported(teacher, images, tmp_path, capsys):
    out = run_encode(teacher, images, tmp_path / "out")
    before = tree(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    run_encode(teacher, images, out)
    assert "already finished, nothing to do" in capsys.readouterr().out
    assert tree(out) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def test_a_missing_shard_is_written_again_and_the_rest_kept(teacher, images, tmp_path):
    out = run_encode(teacher, images, tmp_path / "out")
    before = shard_files(out)
    kept = (out / "s00000.tar").stat().st_mtime_ns
    (out / "s00001.index").unlink()
    (out / "s00002.tar").unlink()
    (out / "s00002.index").unlink()
    run_encode(teacher, images, out)
    assert shard_files(out) == before
    assert (out / "s00000.tar").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"center_crop": True}, "center_crop: false -> true"),
        ({"resolution": 16}, "resolution: 32 -> 16"),
    ],
)
def test_other_settings_on_the_same_output_are_refused_with_the_difference(teacher, images, latents, changes, line):
    before = tree(latents)
    with pytest.raises(ShardError, match=line):
        run_encode(teacher, images, latents, **changes)
    assert tree(latents) == before


def test_another_vae_on_the_same_output_is_refused(images, latents, tmp_path):
    tiny_pipeline(seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(ShardError, match="vae_sha256"):
        run_encode(tmp_path / "other", images, latents)


def test_a_resolution_that_does_not_divide_is_refused(teacher, images, tmp_path):
    with pytest.raises(UserError, match="--resolution 33 is not a multiple of 2"):
        run_encode(teacher, images, tmp_path / "out", resolution=33)


def test_nan_from_the_vae_is_an_error_that_names_the_image(images, tmp_path):
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.vae.quant_conv.bias.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="latents of 000.png contain NaN or Inf"):
        run_encode(tmp_path / "broken", images, tmp_path / "out")
    assert not list((tmp_path / "out").glob("s*"))


def test_random_crops_and_flips_are_recorded_and_repeatable(teacher, images, tmp_path):
    out = run_encode(teacher, images, tmp_path / "out", random_flip=True)
    crops = [s.meta["crop"] for s in read_entries(out, "latents", [])]
    assert len({crop["flip"] for crop in crops}) == 2
    assert crops == [
        s.meta["crop"] for s in read_entries(run_encode(teacher, images, out, random_flip=True), "latents", [])
    ]


def test_the_sidecar_counts_what_it_holds(latents):
    from shards.manifest import read_manifest

    manifest = read_manifest(open_store(latents), "latents")
    counts = [read_sidecar(open_store(latents), s, manifest).count for s in manifest.plan.names()]
    assert counts == [5, 5, 3]


def test_an_image_without_a_caption_is_skipped_and_a_dry_run_says_so(teacher, tmp_path):
    data = write_images(tmp_path / "data", 4)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    del rows[0]["text"]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"teacher": str(teacher), "data": str(data), "out": tmp_path / "planned", "resolution": 32}
    lines = encode.plan(EncodeSettings(**settings))
    assert lines[0] == "entries: 4 in 1 shard, 1 of them still to write"
    assert lines[-1] == "note: 1 of 4 entries will be skipped. The first is 003.png: there is no caption"
    out = run_encode(teacher, data, tmp_path / "out")
    assert len(read_entries(out, "latents", [])) == 3
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert skipped == [{"source_id": "003.png", "reason": "there is no caption"}]


def test_a_dry_run_counts_what_is_still_to_be_written(teacher, images, tmp_path):
    """13 images in shards of 5, 5 and 3; one of 5 is there already."""
    out = run_encode(teacher, images, tmp_path / "out", shard_range="0:1")
    settings = {"teacher": str(teacher), "data": str(images), "out": out, "resolution": 32, "entries_per_shard": 5}
    spec = json.loads((out / "manifest.json").read_text())["spec"]
    size = sizes.stored_bytes(latents_sizes(spec, [])[0].members)
    for part, shards, entries in ((None, 2, 8), ("1:2", 1, 5), ("0:1", 0, 0)):
        lines = encode.plan(EncodeSettings(**settings, shard_range=part))
        assert lines[0] == f"entries: 13 in 3 shards, {shards} of them still to write"
        assert f"total: about {format_bytes(entries * size)}" in lines
