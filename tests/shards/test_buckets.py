"""Sets whose images have several sizes: their plan, their specs, and the order in which they are trained on."""

import collections
import itertools

import numpy as np
import pytest

from shards.buckets import buckets_of_steps, of_bucket, steps_before
from shards.dataset import EpochBatches
from shards.manifest import Manifest, read_manifest, write_manifest
from shards.plan import ShardPlan
from shards.schema import ShardError
from shards.store import open_store

SIZES = [5, 40, 11]


def take(count, **changes):
    given = {"entries": SIZES, "batch_size": 2, "seed": 3, **changes}
    return list(itertools.islice(EpochBatches(**given), count))


def bucket_of(index, rounds=1):
    ends = list(itertools.accumulate(size // rounds for size in SIZES))
    return next(number for number, end in enumerate(ends) if index % ends[-1] < end)


def test_no_shard_crosses_from_one_bucket_to_the_next():
    plan = ShardPlan(12, 4, rounds=2, buckets=[5, 0, 7])
    assert plan.names() == [f"r000{number}-s0000{place}.tar" for number in range(2) for place in range(4)]
    covered = [(shard.bucket, list(shard.indices)) for shard in plan if shard.round == 1]
    assert covered == [(0, [0, 1, 2, 3]), (0, [4]), (2, [5, 6, 7, 8]), (2, [9, 10, 11])]
    with pytest.raises(ShardError, match="its buckets have .* entries, which are not 12 together"):
        ShardPlan(12, 4, buckets=[5, 6])


def test_every_entry_of_a_bucket_comes_once_per_epoch_and_every_batch_is_of_one_bucket():
    lines = collections.defaultdict(list)
    for batch in take(600):
        (bucket,) = {bucket_of(index) for index in batch}
        lines[bucket] += batch
    firsts = 0, 5, 45
    for bucket, size in enumerate(SIZES):
        epochs = [lines[bucket][i : i + size] for i in range(0, len(lines[bucket]) - size, size)]
        assert len(epochs) > 15
        assert all(sorted(epoch) == list(range(firsts[bucket], firsts[bucket] + size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2
    assert take(9, seed=4) != take(9)


def test_a_bucket_is_taken_as_often_as_its_share_demands_over_every_stretch():
    steps = buckets_of_steps(SIZES, 0, 0, 5000)
    for first, length in itertools.product(range(0, 4000, 371), (10, 56, 560)):
        taken = np.bincount(steps[first : first + length], minlength=3)
        assert np.abs(taken - length * np.array(SIZES) / 56).max() < 2.5
    assert (buckets_of_steps(SIZES, 0, 1234, 9) == steps[1234:1243]).all()
    assert steps_before(SIZES, 0, 1234) == np.bincount(steps[:1234]).tolist()
    assert set(buckets_of_steps([0, 3, 0], 1, 0, 99)) == {1}


@pytest.mark.parametrize("step", [1, 7, 250])
def test_the_order_is_exact_from_any_step_and_the_same_for_any_number_of_processes(step):
    """Two processes that take two batches of two at each step, and one that takes four of them."""
    whole = take(4 * step + 40, accumulate=4)
    assert take(40, accumulate=4, start=8 * step) == whole[4 * step :]
    split = [take(20, accumulate=2, start=8 * step, rank=rank, world_size=2) for rank in range(2)]
    assert [batch for pair in zip(*split, strict=True) for batch in pair] == whole[4 * step :]
    one_step = [bucket_of(batch[0]) for batch in whole]
    assert all(len(set(one_step[i : i + 4])) == 1 for i in range(0, len(one_step), 4))


def test_rounds_are_counted_in():
    sizes = [2 * size for size in SIZES]
    seen = {index for batch in take(400, entries=sizes, rounds=2) for index in batch}
    assert seen == set(range(112))
    for batch in take(400, entries=sizes, rounds=2):
        assert len({bucket_of(index) for index in batch}) == 1


def test_each_visit_of_an_entry_is_counted():
    order, visits = EpochBatches(SIZES, 2, 3), collections.Counter()
    for batch, (bucket, position) in itertools.islice(zip(order, order.places(), strict=True), 200):
        for place, index in enumerate(batch):
            assert order.visit(bucket, position + place) == visits[index]
            visits[index] += 1


def described(**changes):
    """The spec of bucketed latents of 2 and 3 images."""
    buckets = [{"size": [8 * n, 8], "latents_shape": [4, n, 1], "entries": n} for n in (2, 3)]
    return {"stage": "latents", "entries": 5, "entries_per_shard": 2, "buckets": buckets, **changes}


def of_cache(**changes):
    taps = {"mid_block": [{"shape": [8, n, 1], "stride": 1} for n in (2, 3)]}
    stated = {"stage": "cache", "entries": 4, "entries_per_shard": 3, "buckets": [{"entries": 1}, {"entries": 3}]}
    return {**stated, "taps": taps, "codec": {"name": "fp16"}, "latents": described(), **changes}


def test_what_a_spec_says_of_one_bucket_is_the_spec_of_a_set_of_that_size():
    latents, cache = of_bucket(described(), 1), of_bucket(of_cache(), 1)
    assert latents == {"stage": "latents", "entries": 5, "entries_per_shard": 2, "latents_shape": [4, 3, 1]}
    assert cache["latents"] == latents
    assert cache["taps"] == {"mid_block": {"shape": [8, 3, 1], "stride": 1}}
    assert "buckets" not in cache
    assert [Manifest(of_cache()).bucket_of(image) for image in range(5)] == [0, 0, 1, 1, 1]
    assert Manifest({"entries": 5}).bucket_of(3) == 0
    with pytest.raises(ShardError, match="image 5 is none of the 5"):
        Manifest(described()).bucket_of(5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (described(buckets=[]), "its buckets are described by"),
        (described(buckets=5), "its buckets are described by"),
        (described(entries=6), "its buckets have not all of its images"),
        (described(buckets=[{"size": [8, 8], "latents_shape": [4, 1, 1], "entries": "5"}]), "has '5' entries of"),
        (described(buckets=[{"size": [8], "latents_shape": [4, 1, 1], "entries": 5}]), "one of its buckets is"),
        (described(buckets=[{"size": [8, 8], "latents_shape": [4, 0, 1], "entries": 5}]), "its latents_shape is"),
        (of_cache(buckets=[{"entries": 4}]), "its buckets are described by"),
        (of_cache(buckets=[{"entries": 3}, {"entries": 1}]), "one of its buckets has 3 entries of 2 images"),
        (of_cache(buckets=[{"entries": 1}, {"entries": 2}]), "entries, which are not 4 together"),
        (of_cache(taps={"mid_block": {"shape": [8, 2, 1], "stride": 1}}), "its buckets are described by"),
        (of_cache(taps={"mid_block": [{"shape": [8, 2], "stride": 1}] * 2}), "its tap mid_block is"),
        (of_cache(latents={"entries": 5, "latents_shape": [4, 1, 1]}), "but its latents have none"),
    ],
)
def test_buckets_that_no_command_can_have_written_are_refused(spec, message, tmp_path):
    store = open_store(tmp_path)
    write_manifest(store, Manifest(spec, 1 if spec["stage"] == "cache" else None))
    with pytest.raises(ShardError, match=message):
        read_manifest(store)


def test_buckets_that_a_command_writes_are_read(tmp_path):
    store = open_store(tmp_path)
    write_manifest(store, Manifest(of_cache(), 1))
    assert [shard.bucket for shard in read_manifest(store).plan] == [0, 1]
