"""A cache in a bucket gives the batches that it gives in a directory."""

import pickle
from dataclasses import fields

import pytest
import torch
from support.buckets import fill

from shards.cache import Cache
from shards.dataset import CacheDataset
from shards.schema import ShardError
from shards.store import open_store

TAPS = ["mid_block"]


@pytest.fixture
def store(cache, bucket):
    fill("cache", cache)
    return open_store("s3://bucket/cache")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return a == b


def test_batches_are_those_of_the_directory(cache, store):
    here, there = CacheDataset(open_store(cache), TAPS), CacheDataset(store, TAPS)
    assert len(here) == len(there)
    chosen = [len(here) - 1, 0, 3, 7, 7]
    assert same(here.collate(here.__getitems__(chosen)), there.collate(there.__getitems__(chosen)))
    calibrations = zip(here.calibrations()["mid_block"], there.calibrations()["mid_block"], strict=True)
    assert all(torch.equal(a, b) for a, b in calibrations)


def test_entries_of_a_batch_are_read_at_once_and_sidecars_once(store, bucket):
    dataset = pickle.loads(pickle.dumps(CacheDataset(store, TAPS)))
    dataset.__getitems__(range(len(dataset)))
    bucket.requests.clear()
    bucket.most, bucket.delay = 0, 0.02
    dataset.__getitems__(range(8))
    assert bucket.most > 1
    assert len(bucket.requests) >= 8
    assert not [request for request in bucket.requests if ".index" in request]


def test_what_cannot_be_read_is_no_damage_and_what_is_missing_is(store, bucket):
    dataset = CacheDataset(store, TAPS)
    bucket.fail("GET .*tar")
    with pytest.raises(OSError, match="3 tries failed") as caught:
        dataset.__getitems__([0, 1])
    assert caught.value.filename.startswith("s3://bucket/cache/")
    bucket.reset()
    store.delete("r0000-s00000.tar")
    with pytest.raises(ShardError, match=r"s3://bucket/cache/r0000-s00000.tar is damaged: it is missing"):
        dataset[0]
    with pytest.raises(ShardError, match="it is missing"):
        Cache(store)
