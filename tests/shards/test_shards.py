"""Writing and reading shards: stock tools read them, equal input gives equal bytes, damage is seen."""

import json
import tarfile
import zlib

import numpy as np
import pytest
import webdataset
from support import sidecars

from shards.codec import pack_quantised
from shards.files import write_bytes
from shards.manifest import (
    Manifest,
    difference,
    known_to,
    read_file,
    read_manifest,
    refuse_other_spec,
    sha256_of_json,
    write_manifest,
)
from shards.plan import ShardPlan
from shards.reader import ShardSet
from shards.schema import ShardError
from shards.sidecar import read_head, read_row, read_sidecar
from shards.store import open_store
from shards.writer import EntryBuilder, write_shard

TAP = "tap.down_blocks.0.npy.zst"
SPEC = {"stage": "latents", "entries": 5, "entries_per_shard": 3}


def make_entry(index: int) -> EntryBuilder:
    entry = EntryBuilder(f"{index:09d}", {"caption": f"ein Bild – {index}", "source_id": f"{index}.png"})
    entry.add_array("latents", np.full((4, 3), index, np.float16))
    q = np.arange(24).reshape(2, 3, 4) * (index + 1)
    entry.add_compressed("tap.down_blocks.0", *pack_quantised(q, np.array([0.5, index], np.float32)))
    return entry


def make_set(directory, spec=SPEC):
    directory.mkdir(exist_ok=True)
    manifest = Manifest(spec)
    write_manifest(open_store(directory), manifest)
    for number, shard in enumerate(manifest.plan.names()):
        indices = range(number * 3, min(number * 3 + 3, 5))
        write_shard(open_store(directory), shard, manifest, map(make_entry, indices), [])
    return directory


@pytest.fixture
def directory(tmp_path):
    return make_set(tmp_path / "set")


CACHE = {**SPEC, "stage": "cache", "latents": {"entries": 5}}


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (SPEC | {"entries": 10**12}, "the number of entries is 1000000000000"),
        (SPEC | {"entries": "48"}, "the number of entries is '48'"),
        (SPEC | {"entries_per_shard": 0}, "the number of entries per shard is 0"),
        ({"stage": "latents"}, "the number of entries is None"),
        (SPEC | {"latents_shape": [4, 10**12]}, "its latents_shape is "),
        (SPEC | {"prompt_embeds_shape": 7}, "its prompt_embeds_shape is 7"),
        (CACHE | {"latents": []}, "its latents are not described"),
        (CACHE | {"latents": {"entries": 4}}, "it has 5 entries of 4 images"),
        (CACHE | {"taps": {"mid": {"shape": [1, 2], "stride": 1}}}, "its tap mid is "),
        (CACHE | {"taps": {"mid": {"shape": [1, 2, 2], "stride": 0}}}, "its tap mid is "),
        (CACHE | {"taps": 5}, "its taps or its noise scheduler are not described"),
        (CACHE | {"noise_scheduler": {"num_train_timesteps": "x"}}, "its noise scheduler has no number"),
    ],
)
def test_a_forged_spec_is_refused_whatever_its_hash(tmp_path, spec, problem):
    write_manifest(open_store(tmp_path), Manifest(spec, None if spec["stage"] == "latents" else 2))
    with pytest.raises(ShardError, match=f"manifest.json cannot be used: {problem}.*Restore it from a backup"):
        read_manifest(open_store(tmp_path))


def test_stock_webdataset_finds_every_member(directory):
    shards = [str(directory / name) for name in ShardPlan(5, 3).names()]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"{i:09d}" for i in range(5)]
    for index, sample in enumerate(samples):
        assert sample["json"] == {"caption": f"ein Bild – {index}", "source_id": f"{index}.png"}
        np.testing.assert_array_equal(sample["latents.npy"], np.full((4, 3), index, np.float16))
        assert sample["tap.down_blocks.0.npy.zst"] == make_entry(index).members["tap.down_blocks.0.npy.zst"]


def test_the_sidecar_locates_each_member(directory):
    for shard in ShardPlan(5, 3).names():
        sidecar = read_sidecar(open_store(directory), shard, Manifest(SPEC))
        stated = {
            f"{row.key}.{name}": tuple(where[:2])
            for row in map(sidecar.row, range(sidecar.count))
            for name, where in row.members.items()
        }
        with tarfile.open(directory / shard) as tar:
            found = {info.name: (info.offset_data, info.size) for info in tar}
        assert stated == found


def test_equal_entries_give_equal_bytes(directory, tmp_path):
    again = make_set(tmp_path / "again")
    for path in directory.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_reading_by_position(directory):
    shards = ShardSet(open_store(directory), "latents")
    assert len(shards) == 5
    for index in (4, 0, 3, 2, 1):
        sample = shards.read(index, ["latents", "tap.down_blocks.0"])
        assert sample.key == f"{index:09d}"
        np.testing.assert_array_equal(sample.tensors["latents"].values, np.full((4, 3), index, np.float16))
        quantised = sample.tensors["tap.down_blocks.0"]
        np.testing.assert_array_equal(quantised.values, np.arange(24).reshape(2, 3, 4) * (index + 1))
        np.testing.assert_array_equal(quantised.mu, np.array([0.5, index], np.float32))


def test_an_exception_while_writing_leaves_no_shard(tmp_path):
    def entries():
        yield make_entry(0)
        raise RuntimeError("the device fell over")

    with pytest.raises(RuntimeError):
        write_shard(open_store(tmp_path), "s00000.tar", Manifest(SPEC), entries(), [])
    assert list(tmp_path.iterdir()) == []
    assert not open_store(tmp_path).exists("s00000.index")


def test_a_tar_without_its_sidecar_is_unfinished(directory):
    (directory / "s00001.index").unlink()
    with pytest.raises(ShardError, match=r"Missing shards: 1 of 2, from s00001.tar on.*Rerun the same"):
        ShardSet(open_store(directory), "latents")


@pytest.mark.parametrize("cut", [1, 512, 1024, 3000])
def test_a_cut_tar_is_refused_by_name(directory, cut):
    path = directory / "s00000.tar"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ShardError, match=r"s00000.tar is damaged.*Delete this shard's"):
        ShardSet(open_store(directory), "latents")


def test_a_flipped_bit_in_any_member_is_refused_by_name(directory):
    path = directory / "s00000.tar"
    whole = path.read_bytes()
    sidecar = read_sidecar(open_store(directory), "s00000.tar", Manifest(SPEC))
    for name, (offset, length, _, _) in sidecar.row(1).members.items():
        damaged = bytearray(whole)
        damaged[offset + length // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=f"s00000.tar.*000000001.{name}"):
            ShardSet(open_store(directory), "latents").read(1, ["latents", "tap.down_blocks.0"])


def test_a_shard_of_another_set_is_refused(directory, tmp_path):
    other = make_set(tmp_path / "other", {**SPEC, "seed": 1})
    for name in ("s00000.tar", "s00000.index"):
        (directory / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ShardError, match="s00000.index belongs to another shard set"):
        ShardSet(open_store(directory), "latents")


@pytest.mark.parametrize("content", ["", "{", "[]\n", '{"format": 2}\n', "x" * 5000])
def test_a_damaged_sidecar_is_refused_by_name(directory, content):
    (directory / "s00000.index").write_text(content)
    with pytest.raises(ShardError, match="s00000.index is damaged"):
        read_sidecar(open_store(directory), "s00000.tar", Manifest(SPEC))


@pytest.mark.parametrize("row", [[-1, 5, 5, 0], [0, 1 << 60, 5, 0], [1 << 62, 1, 1, 0]])
def test_a_sidecar_that_points_outside_its_shard_is_refused(directory, row):
    path = directory / "s00000.index"
    head, table = sidecars.load(path)
    table[1, sidecars.columns(head, "latents.npy")] = row
    sidecars.save(path, head, table)
    with pytest.raises(ShardError, match="s00000.index is damaged.*outside the shard"):
        ShardSet(open_store(directory), "latents").read(1, ["latents"])
    with pytest.raises(ShardError, match="s00000.index is damaged.*outside the shard"):
        read_sidecar(open_store(directory), "s00000.tar", Manifest(SPEC))


def test_the_head_of_a_sidecar_is_a_line_of_json_and_the_rest_a_table(directory):
    """As the format page says, without this package."""
    data = (directory / "s00000.index").read_bytes()
    head = json.loads(data.split(b"\n")[0])
    start = data.index(b"\n") + 1
    assert start % 64 == 0
    assert (head["format"], head["count"], head["members"]) == (2, 3, ["json", "latents.npy", TAP])
    table = np.frombuffer(data[start:], "<i8").reshape(3, 2 + 4 * 3)
    assert table[:, 0].tolist() == [0, 1, 2]
    assert head["images"] == [0, 2]
    assert zlib.crc32(data[start:]) == head["table_crc32"]
    with open(directory / "s00000.tar", "rb") as tar:
        for row in table.tolist():
            crcs = []
            for member in range(3):
                offset, length, _, crc32 = row[2 + 4 * member :][:4]
                tar.seek(offset)
                assert zlib.crc32(tar.read(length)) == crc32
                crcs.append(crc32)
            assert zlib.crc32(np.array(crcs[1:], "<u4").tobytes()) == row[1]


def test_a_shard_with_many_skipped_images_has_a_long_head(tmp_path):
    skipped = [{"source_id": f"{i}.png", "reason": "it is not an image: " + "x" * 60} for i in range(200)]
    manifest = Manifest(SPEC | {"entries": 201, "entries_per_shard": 300})
    write_shard(open_store(tmp_path), "s00000.tar", manifest, [make_entry(200)], skipped)
    head = read_head(open_store(tmp_path), "s00000.tar", manifest)
    assert (head.count, head.skipped, head.images) == (1, skipped, (200, 200))
    assert read_row(open_store(tmp_path), head, 0, manifest).key == "000000200"


@pytest.mark.parametrize("item", [1, "x", {}, {"source_id": "a.png"}, {"source_id": 1, "reason": "gone"}])
def test_a_skipped_image_without_its_name_or_reason_is_damage(tmp_path, item):
    manifest = Manifest(SPEC | {"entries": 2, "entries_per_shard": 2})
    write_shard(open_store(tmp_path), "s00000.tar", manifest, [make_entry(0)], [item])
    with pytest.raises(ShardError, match=r"s00000.index is damaged: .*it states the skipped image"):
        read_head(open_store(tmp_path), "s00000.tar", manifest)


def test_a_set_of_format_1_goes_on_in_its_format(tmp_path):
    """Its sidecars are JSON, and a reader sees the same."""
    manifest = Manifest(SPEC, version=1)
    new, old = make_set(tmp_path / "new"), tmp_path / "old"
    old.mkdir()
    write_manifest(open_store(old), manifest)
    for number, shard in enumerate(manifest.plan.names()):
        indices = range(number * 3, min(number * 3 + 3, 5))
        write_shard(open_store(old), shard, manifest, map(make_entry, indices), [])
    assert sorted(path.name for path in old.glob("s*")) == ["s00000.json", "s00000.tar", "s00001.json", "s00001.tar"]
    assert json.loads((old / "s00000.json").read_text())["format"] == 1
    sets = [ShardSet(open_store(directory), "latents") for directory in (old, new)]
    for index in range(5):
        assert sets[0].row(index) == sets[1].row(index)
        first, second = (shards.read(index, ["latents"]) for shards in sets)
        assert (first.key, first.meta) == (second.key, second.meta)


def test_a_missing_tensor_is_named(directory):
    with pytest.raises(ShardError, match=r"holds no noise.npy for entry 000000002; it has json, latents.npy"):
        ShardSet(open_store(directory), "latents").read(2, ["noise"])


def test_a_directory_without_manifest_names_the_command(tmp_path):
    with pytest.raises(ShardError, match="no manifest.json.*distill-sd encode"):
        read_manifest(open_store(tmp_path), "latents")


def test_an_edited_manifest_is_refused(directory):
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"entries": 5', '"entries": 4'))
    with pytest.raises(ShardError, match="manifest.json was edited"):
        ShardSet(open_store(directory), "latents")


def test_a_manifest_of_the_other_stage_is_refused(directory):
    with pytest.raises(ShardError, match="describes latents, not cache"):
        read_manifest(open_store(directory), "cache")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 99, "spec": {}, "rounds": null, "files": {}, "spec_sha256": ""}']
)
def test_a_manifest_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ShardError, match="manifest.json"):
        read_manifest(open_store(tmp_path), "latents")


def test_a_file_next_to_the_shards_is_read_only_unchanged(tmp_path):
    manifest = Manifest(SPEC, files={"extra.npy": write_bytes(tmp_path / "extra.npy", b"content")})
    write_manifest(open_store(tmp_path), manifest)
    manifest = read_manifest(open_store(tmp_path), "latents")
    assert read_file(open_store(tmp_path), manifest, "extra.npy") == b"content"
    for damage in (lambda path: path.write_bytes(b"contenu"), lambda path: path.unlink()):
        damage(tmp_path / "extra.npy")
        with pytest.raises(ShardError, match="extra.npy is missing or was changed"):
            read_file(open_store(tmp_path), manifest, "extra.npy")


def test_what_an_earlier_version_did_not_state_is_no_difference():
    stated = {"seed": 0, "teacher": {"unet": "a"}}
    now = {"seed": 0, "configs": {"vae": {}}, "teacher": {"unet": "a", "configs": {"unet": {"act_fn": "relu"}}}}
    assert known_to(stated, now) == stated
    refuse_other_spec("here", stated, now)
    with pytest.raises(ShardError, match=r'teacher\.unet: "a" -> "b"'):
        refuse_other_spec("here", stated, {**now, "teacher": {**now["teacher"], "unet": "b"}})
    with pytest.raises(ShardError, match=r'configs\.vae\.act_fn: null -> "relu"'):
        refuse_other_spec("here", now, {**now, "configs": {"vae": {"act_fn": "relu"}}})
    # A field that every version stated.
    with pytest.raises(ShardError, match="seed: null -> 0"):
        refuse_other_spec("here", {}, {"seed": 0})


def test_the_difference_names_each_field():
    old = {"seed": 0, "codec": {"name": "dither", "snr_db": 15.0}, "shape": [4, 8]}
    new = {"seed": 0, "codec": {"name": "dither", "snr_db": 10.0}, "shape": (4, 9), "dtype": "fp16"}
    assert difference(old, json.loads(json.dumps(new))) == [
        "codec.snr_db: 15.0 -> 10.0",
        "shape: [4, 8] -> [4, 9]",
        'dtype: null -> "fp16"',
    ]
    with pytest.raises(ShardError, match="codec.snr_db: 15.0 -> 10.0"):
        refuse_other_spec("out", old, new)
    refuse_other_spec("out", {"shape": [1, 2]}, {"shape": (1, 2)})


def test_a_spec_hash_does_not_depend_on_the_order_of_fields():
    assert sha256_of_json({"a": 1, "b": [2]}) == sha256_of_json({"b": [2], "a": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 2})
