"""The order of an epoch: whole, exact from any position, and the same for any number of processes."""

import itertools

import pytest

from shards.dataset import EpochBatches, RoundBatches


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


def rounds_of(indices, entries):
    return [index // entries for index in indices]


@pytest.mark.parametrize(("entries", "batch_size"), [(10, 5), (7, 3), (5, 8), (1, 4)])
def test_one_round_comes_after_another_each_in_an_order_of_its_own(entries, batch_size):
    line = list(itertools.chain(*take(RoundBatches(4 * entries, batch_size, seed=3, rounds=4), 60)))
    for number, start in enumerate(range(0, len(line) - entries + 1, entries)):
        first = number % 4 * entries
        assert sorted(line[start : start + entries]) == list(range(first, first + entries))
    assert rounds_of(line[: 4 * entries], entries) == sorted(rounds_of(line[: 4 * entries], entries))


def test_the_order_of_a_round_does_not_depend_on_how_many_there_are():
    few, many = (RoundBatches(50 * rounds, 7, seed=1, rounds=rounds) for rounds in (3, 9))
    assert take(few, 21) == take(many, 21)
    line = list(itertools.chain(*take(few, 22)))
    assert [index % 50 for index in line[:50]] != [index % 50 for index in line[50:100]]


@pytest.mark.parametrize("start", [0, 12, 24])
def test_rounds_resume_at_any_step_and_are_shared_by_processes(start):
    whole = take(RoundBatches([24, 12], 12, seed=5, rounds=3), 12)
    later = [
        take(RoundBatches([24, 12], 4, seed=5, rounds=3, start=start, rank=rank, world_size=3), 6) for rank in range(3)
    ]
    assert [list(itertools.chain(*step)) for step in zip(*later, strict=True)] == whole[start // 12 : start // 12 + 6]


@pytest.mark.parametrize(
    ("counts", "batch_size", "at_once"), [([40], 10, 1), ([28], 3, 2), ([12], 8, 4), ([40, 24, 12], 2, 3)]
)
def test_what_a_step_takes_is_never_older_than_what_is_left_nor_beyond_the_reach(counts, batch_size, at_once):
    order = RoundBatches(counts, batch_size, seed=2, rounds=4)
    steps = 50
    furthest, most = 0, 0
    for step, batch in enumerate(take(order, steps)):
        position = step * batch_size
        needed = order.rounds_of_step(position)
        assert {number % 4 for number in needed} == set(rounds_of(batch, sum(counts) // 4))
        assert order.oldest_round(position) <= needed.start
        most = max(most, needed.stop - order.oldest_round(position))
        furthest = max(furthest, needed.stop)
    assert order.reach(steps) == (most, furthest)
    assert most <= at_once
