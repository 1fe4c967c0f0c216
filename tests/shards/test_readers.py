"""The readers of a rolling cache: what is written for them, kept for them, and deleted when all have passed."""

import pytest
from support.stages import tree

from shards.manifest import Manifest, read_manifest, write_manifest
from shards.readers import (
    DELETING,
    Reader,
    announce,
    drop_reader,
    kept_rounds,
    read_readers,
    rounds_there,
    wanted_rounds,
    write_reader,
)
from shards.schema import ShardError, round_of
from shards.store import LocalStore, open_store
from shards.window import delete_passed, wanted_shards


def reader(name, next, end=10, rounds=10):
    return Reader(name, f"training of {name}", next, end, rounds)


def test_before_there_is_a_reader_the_first_rounds_are_written():
    assert wanted_rounds([], 3, 10) == [0, 1, 2]
    assert kept_rounds([], 3) is None


@pytest.mark.parametrize(
    ("readers", "wanted", "kept"),
    [
        ([reader("a", 4)], [4, 5], {4, 5}),
        ([reader("a", 4), reader("b", 5)], [4, 5], {4, 5, 6}),
        # One that comes late: the others keep what they wait at.
        ([reader("a", 7), reader("b", 0)], [0, 1], {0, 1, 7, 8}),
        # Nothing is written that nobody will read.
        ([reader("a", 4, end=5)], [4], {4}),
        ([reader("a", 9)], [9], {9}),
        ([reader("a", 4, end=4), reader("b", 2)], [2, 3], {2, 3}),
        # A second pass begins with round 0.
        ([reader("a", 9, end=20)], [9, 0], {9, 0}),
        ([reader("a", 10, end=20), reader("b", 9, end=20)], [9, 0], {9, 0, 1}),
        # One that trains on the first rounds alone goes through them again.
        ([reader("a", 5, end=20, rounds=4)], [1, 2], {1, 2}),
        ([reader("a", 5, end=20, rounds=4), reader("b", 5)], [1, 5, 2, 6], {1, 2, 5, 6}),
    ],
)
def test_the_window_follows_the_slowest_reader(readers, wanted, kept):
    assert wanted_rounds(readers, 2, 10) == wanted
    assert kept_rounds(readers, 2) == kept


def test_readers_that_are_done_hold_nothing():
    done = [reader("a", 10), reader("b", 5, end=5)]
    assert wanted_rounds(done, 2, 10) == []
    assert kept_rounds(done, 2) is None


def test_a_reader_is_a_file_that_comes_and_goes(tmp_path):
    store = LocalStore(tmp_path)
    assert read_readers(store) == []
    write_reader(store, reader("b", 0), new=True)
    with pytest.raises(FileExistsError):
        write_reader(store, reader("b", 0), new=True)
    write_reader(store, reader("a", 1))
    write_reader(store, reader("b", 3))
    (tmp_path / "readers" / ".c.json.partial").write_text("half")
    found = read_readers(store)
    assert [(each.name, each.next) for each in found] == [("a", 1), ("b", 3)]
    assert found[0].seen.endswith("+00:00")
    drop_reader(store, "a")
    assert [each.name for each in read_readers(store)] == ["b"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "a"}', "\0"])
def test_a_damaged_file_of_a_reader_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "readers").mkdir()
    (tmp_path / "readers" / "a.json").write_text(content)
    with pytest.raises(ShardError, match=r"readers/a\.json is damaged.*drop-reader"):
        read_readers(LocalStore(tmp_path))


def spec(images=5, per_shard=2):
    return {"stage": "cache", "entries": images, "entries_per_shard": per_shard, "latents": {"entries": images}}


@pytest.fixture
def store(tmp_path):
    """Rounds 0 to 3 of six, as files without content."""
    manifest = Manifest(spec(), rounds=6, window=2)
    for shard in manifest.plan.shards[: 4 * 3]:
        (tmp_path / shard.name).touch()
        (tmp_path / manifest.sidecar_name(shard.name)).touch()
    return LocalStore(tmp_path)


MANIFEST = Manifest(spec(), rounds=6, window=2)


def left(store):
    return sorted({round_of(name) for name in store.list() if name.startswith("r0")})


def test_a_round_is_deleted_when_all_readers_have_passed_it(store):
    delete_passed(store, MANIFEST, read_readers(store))
    assert left(store) == [0, 1, 2, 3]
    write_reader(store, reader("a", 3, 6, 6))
    write_reader(store, reader("b", 2, 6, 6))
    (store.directory / ".r0000-s00001.tar.kept").touch()
    delete_passed(store, MANIFEST, read_readers(store))
    assert left(store) == [2, 3]
    assert not [name for name in store.list() if "r0000" in name or name == DELETING]
    assert [[shard.round for shard in shards] for shards in wanted_shards(MANIFEST, read_readers(store))] == [
        [2] * 3,
        [3] * 3,
    ]
    drop_reader(store, "b")
    delete_passed(store, MANIFEST, read_readers(store))
    assert left(store) == [3]
    write_reader(store, reader("a", 6, 6, 6))
    delete_passed(store, MANIFEST, read_readers(store))
    assert left(store) == [3]
    assert wanted_shards(MANIFEST, read_readers(store)) is None


def test_no_round_is_deleted_that_a_reader_asks_for_meanwhile(store, monkeypatch):
    """It registers between the writer's first look and its second."""
    write_reader(store, reader("a", 3, 6, 6))
    monkeypatch.setattr("shards.window.announce", lambda *args: (announce(*args), write_reader(store, reader("b", 1))))
    delete_passed(store, MANIFEST, read_readers(store))
    assert left(store) == [1, 2, 3]


def test_a_round_about_to_go_counts_as_gone(store):
    """The reader sees the announcement, wherever the writer is or was killed."""
    assert rounds_there(store, 3) == {0, 1, 2, 3}
    announce(store, {0, 2})
    assert rounds_there(store, 3) == {1, 3}
    store.delete("r0001-s00001.index")
    assert rounds_there(store, 3) == {3}
    # A writer that begins again withdraws it.
    delete_passed(store, MANIFEST, read_readers(store))
    assert rounds_there(store, 3) == {0, 2, 3}


def test_both_sides_agree_in_a_bucket(bucket):
    store = open_store("s3://bucket/cache")
    assert read_readers(store) == []
    write_reader(store, reader("a", 1, 6, 6), new=True)
    with pytest.raises(FileExistsError):
        write_reader(store, reader("a", 1, 6, 6), new=True)
    for shard in MANIFEST.plan.shards[: 2 * 3]:
        for name in (shard.name, MANIFEST.sidecar_name(shard.name)):
            with store.write(name) as stream:
                stream.write(b"-")
    assert rounds_there(store, 3) == {0, 1}
    delete_passed(store, MANIFEST, read_readers(store))
    assert rounds_there(store, 3) == {1}
    drop_reader(store, "a")
    assert read_readers(store) == []


def test_the_manifest_states_the_window_under_its_seal(cache, tmp_path):
    found = read_manifest(LocalStore(cache))
    plain = tree(cache)["manifest.json"]
    assert b"window" not in plain
    write_manifest(LocalStore(tmp_path), Manifest(found.spec, found.rounds, found.files, window=1))
    assert read_manifest(LocalStore(tmp_path)).window == 1
    text = (tmp_path / "manifest.json").read_text()
    for other in ("2", "0", "true", '"1"'):
        (tmp_path / "manifest.json").write_text(text.replace('"window": 1', f'"window": {other}'))
        with pytest.raises(ShardError, match="invalid window"):
            read_manifest(LocalStore(tmp_path))
    (tmp_path / "manifest.json").write_text(text.replace(' "window": 1,\n', ""))
    with pytest.raises(ShardError, match="was edited"):
        read_manifest(LocalStore(tmp_path))
