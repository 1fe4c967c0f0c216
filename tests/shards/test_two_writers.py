"""Two writers of one shard in a bucket, of which neither knows of the other, leave a tar and its own sidecar."""

import numpy as np
import pytest
from support.buckets import held

from shards import writer
from shards.manifest import Manifest, write_manifest
from shards.reader import ShardSet
from shards.store import open_store
from shards.writer import EntryBuilder, write_shard

SPEC = {"stage": "latents", "entries": 2, "entries_per_shard": 2, "latents_shape": [1, 2, 2]}
MANIFEST, SHARD = Manifest(SPEC), "s00000.tar"


def write(store, value):
    entries = [EntryBuilder(f"{key:09d}", {"caption": "a tree"}) for key in range(2)]
    for entry in entries:
        entry.add_array("latents", np.full((1, 2, 2), value, np.float16))
    write_shard(store, SHARD, MANIFEST, entries, [])


@pytest.fixture
def store(bucket, monkeypatch):
    monkeypatch.setattr(writer, "PATIENCE", (0.0, 0.0))
    store = open_store("s3://bucket/set")
    write_manifest(store, MANIFEST)
    return store


def stored_value(store):
    """The value that a reader finds, with all its checks."""
    return float(ShardSet(store, "latents").read(0, ["latents"]).tensors["latents"].values.max())


def test_a_finished_shard_stays_whoever_comes_second(store, bucket):
    write(store, 1)
    before = held("set")
    write(store, 2)
    assert held("set") == before
    assert stored_value(store) == 1


def test_a_tar_of_the_same_bytes_is_not_written_again_and_gets_its_sidecar(store, bucket):
    write(store, 1)
    before = held("set")
    store.delete("s00000.index")
    bucket.requests.clear()
    write(store, 1)
    assert held("set") == before
    assert [request for request in bucket.requests if "PUT" in request] == ["PUT /bucket/set/s00000.tar"] + [
        "PUT /bucket/set/s00000.index"
    ]


def test_a_tar_whose_writer_was_killed_is_replaced(store):
    write(store, 1)
    store.delete("s00000.index")
    write(store, 2)
    assert stored_value(store) == 2


def test_a_sidecar_that_came_between_is_replaced_together_with_its_tar(store, monkeypatch):
    """The other writer puts both files after this one has put its tar."""
    put, turns = writer._put, []

    def overtaken(place, name, data, *, new=False):
        if name == "s00000.index" and not turns:
            turns.append(name)
            store.delete(SHARD)
            write(store, 1)
        put(place, name, data, new=new)

    monkeypatch.setattr(writer, "_put", overtaken)
    write(store, 2)
    assert turns
    assert stored_value(store) == 2
