"""distill-sd inspect: the contents of a set as text, and its images."""

import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support.stages import read_entries, run_encode, run_teacher_cache, tree
from support.tiny import write_images

from pipeline.cli import main
from pipeline.commands.inspect_shards import histogram
from shards.manifest import read_manifest
from shards.sidecar import read_sidecar
from shards.store import open_store


@pytest.fixture(scope="module")
def latents(teacher, tmp_path_factory):
    work = tmp_path_factory.mktemp("inspect")
    data = write_images(work / "images", 5)
    (data / "002.png").write_bytes(b"not an image")
    return run_encode(teacher, data, work / "latents", entries_per_shard=3)


@pytest.fixture(scope="module")
def cache(teacher, latents):
    return run_teacher_cache(teacher, latents, latents.parent / "cache", entries_per_shard=3)


def inspect(*arguments):
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_cache_is_shown_and_left_alone(cache):
    before = tree(cache)
    status, output = inspect(cache)
    assert status == 0
    for line in (
        "stage: cache",
        "prediction_type: epsilon",
        'codec: {"name": "dither", "snr_db": 5.0}',
        "resolution: 32",
        "tap up_blocks.3: [8, 16, 16], stride 4",
        "rounds: 2",
        "shards: 4 of 4",
        "entries: 8",
    ):
        assert line in output.splitlines()
    entry = read_entries(cache, "cache", [])[0]
    assert f"entry {entry.key}\n  caption: {entry.meta['caption']}\n  source: 000.png" in output
    assert tree(cache) == before


def test_the_bytes_match_the_sidecars(cache):
    _, output = inspect(cache)
    manifest = read_manifest(open_store(cache))
    sidecars = [read_sidecar(open_store(cache), shard, manifest) for shard in manifest.plan.names()]
    for number, name in enumerate(sidecars[0].head.members):
        total = sum(int(sidecar.places[:, number, 1].sum()) for sidecar in sidecars)
        assert re.search(rf"^{re.escape(name)} +{round(total / 8):,} +{total:,}$", output, re.MULTILINE), name
    assert re.search(rf"^tars, with headers .* {sum(s.head.bytes for s in sidecars):,}$", output, re.MULTILINE)


def test_the_histogram_counts_every_timestep(cache):
    _, output = inspect(cache)
    bars = re.findall(r"^ +(\d+) to (\d+) +#* *(\d+)$", output, re.MULTILINE)
    assert [(bars[0][0], bars[0][1]), (bars[-1][0], bars[-1][1])] == [("0", "99"), ("900", "999")]
    timesteps = [entry.meta["timestep"] for entry in read_entries(cache, "cache", [])]
    assert [int(count) for _, _, count in bars] == np.histogram(timesteps, 10, (0, 1000))[0].tolist()
    assert histogram([5, 5, 999], 1000)[1] == "    0 to 99    " + "#" * 40 + " 2"
    assert histogram([5, 5, 999], 1000)[10] == "  900 to 999   " + "#" * 20 + " " * 20 + " 1"


def test_latents_are_shown_without_timesteps(latents):
    status, output = inspect(latents)
    assert status == 0
    assert "stage: latents" in output
    assert "entries: 4, 1 skipped" in output
    assert "timesteps" not in output


def test_an_unfinished_set_shows_its_finished_shards(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "cache")
    (copy / "r0001-s00001.index").unlink()
    status, output = inspect(copy)
    assert status == 0
    assert "shards: 3 of 4 (unfinished)" in output
    for path in copy.glob("r0*.index"):
        path.unlink()
    status, output = inspect(copy)
    assert status == 2
    assert "holds no entries yet" in output


def test_images_are_the_latents_decoded_by_the_vae_of_the_base(teacher, cache, tmp_path):
    import torch
    from diffusers import AutoencoderKL

    status, output = inspect(cache, "--images", tmp_path / "out")
    assert status == 0, output
    assert f"Wrote 8 images to {tmp_path / 'out'}." in output
    vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae")
    for entry in read_entries(cache, "cache", ["latents"])[::3]:
        latents = torch.tensor(entry.tensors["latents"].values).float()[None] / vae.config.scaling_factor
        with torch.no_grad():
            decoded = vae.decode(latents).sample[0].permute(1, 2, 0).numpy()
        image = np.asarray(Image.open(tmp_path / "out" / f"{entry.key}.png"))
        np.testing.assert_allclose(image, np.clip(decoded * 127.5 + 127.5, 0, 255), atol=1)
    status, output = inspect(cache, "--images", tmp_path / "out")
    assert (status, "already exists" in output) == (2, True)


def test_images_need_a_vae(latents, tmp_path):
    status, output = inspect(latents, "--images", tmp_path / "out")
    assert status == 2
    assert f"--images needs base/vae, which {latents} lacks. Pass a cache" in output
    assert not (tmp_path / "out").exists()


def test_a_directory_without_shards_is_refused(tmp_path):
    for directory, message in (
        (tmp_path, "has no manifest.json, so it is not a latents or cache directory"),
        (tmp_path / "nowhere", "nowhere does not exist. Check the path"),
    ):
        status, output = inspect(directory)
        assert status == 2
        assert message in output
