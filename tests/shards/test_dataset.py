"""The order of an epoch: whole, exact from any position, and the same for any number of processes."""

import itertools

import pytest

from shards.dataset import EpochBatches


def take(batches: EpochBatches, count: int) -> list[list[int]]:
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize(("entries", "batch_size"), [(10, 5), (10, 3), (7, 7), (5, 8), (1, 4), (100, 1)])
def test_every_entry_comes_once_an_epoch_and_no_batch_is_partial(entries, batch_size):
    batches = take(EpochBatches(entries, batch_size, seed=3), 40)
    assert {len(batch) for batch in batches} == {batch_size}
    line = list(itertools.chain(*batches))
    for start in range(0, len(line) - entries + 1, entries):
        assert sorted(line[start : start + entries]) == list(range(entries))


def test_epochs_and_seeds_have_orders_of_their_own():
    line = list(itertools.chain(*take(EpochBatches(50, 10, seed=0), 10)))
    assert line[:50] != line[50:]
    assert line[:50] != list(range(50))
    assert line != list(itertools.chain(*take(EpochBatches(50, 10, seed=1), 10)))
    assert line == list(itertools.chain(*take(EpochBatches(50, 10, seed=0), 10)))


@pytest.mark.parametrize("start", [0, 4, 12, 28])
def test_the_stream_resumes_at_any_position(start):
    whole = list(itertools.chain(*take(EpochBatches(11, 4, seed=5), 20)))
    later = list(itertools.chain(*take(EpochBatches(11, 4, seed=5, start=start), 5)))
    assert later == whole[start : start + 20]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_share_one_global_order(world_size):
    """Any number of processes, with the same global batch, takes the same samples at each step."""
    single = take(EpochBatches(17, 12, seed=2), 9)
    ranks = [
        take(EpochBatches(17, 12 // world_size, seed=2, rank=rank, world_size=world_size), 9)
        for rank in range(world_size)
    ]
    assert [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)] == single
