"""The plan: every entry in exactly one shard per round, names that do not change, and who writes what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.plan import ShardPlan, count_entries, share
from shards.schema import ShardError, round_of, sidecar_name
from shards.store import open_store


def test_each_round_has_shards_of_its_own_and_more_rounds_change_none():
    assert ShardPlan(5, 3).names() == ["s00000.tar", "s00001.tar"]
    two, three = ShardPlan(5, 3, rounds=2).names(), ShardPlan(5, 3, rounds=3).names()
    assert two == three[:4] == ["r0000-s00000.tar", "r0000-s00001.tar", "r0001-s00000.tar", "r0001-s00001.tar"]
    assert ShardPlan(0, 3).names() == []


@given(st.integers(0, 60), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 4)))
def test_every_entry_is_in_one_shard_of_each_round(entries, entries_per_shard, rounds):
    plan = ShardPlan(entries, entries_per_shard, rounds)
    assert count_entries(plan.shards) == entries * (rounds or 1)
    for number in [None] if rounds is None else range(rounds):
        covered = [index for shard in plan if shard.round == number for index in shard.indices]
        assert covered == list(range(entries))
    assert all(round_of(shard.name) == shard.round and len(shard.indices) <= entries_per_shard for shard in plan)


def test_unfinished_are_the_shards_without_a_sidecar(tmp_path):
    plan = ShardPlan(5, 2, rounds=2)
    assert plan.unfinished(open_store(tmp_path / "not there yet")) == plan.shards
    (tmp_path / plan.shards[0].name).touch()
    for shard in (plan.shards[1], plan.shards[4]):
        (tmp_path / sidecar_name(shard.name)).touch()
    assert plan.unfinished(open_store(tmp_path)) == [plan.shards[i] for i in (0, 2, 3, 5)]
    assert plan.unfinished(open_store(tmp_path), slice(1, 4)) == plan.shards[2:4]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_the_shares_are_disjoint_and_complete(processes):
    shards = ShardPlan(11, 2).shards
    shares = [share(shards, process, processes) for process in range(processes)]
    assert sorted((shard for own in shares for shard in own), key=lambda shard: shard.name) == shards
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ((10**12, 1000), "the number of entries is 1000000000000, not one from 0 to 1000000000"),
        ((-1, 1000), "the number of entries is -1"),
        (("48", 10), "the number of entries is '48'"),
        ((True, 10), "the number of entries is True"),
        ((5.0, 10), "the number of entries is 5.0"),
        ((48, 0), "the number of entries per shard is 0, not one from 1"),
        ((48, -5), "the number of entries per shard is -5"),
        ((48, 10, 0), "the number of rounds is 0"),
        ((48, 10, 10**12), "the plan has 5000000000000 shards, more than 1000000"),
        ((10**9, 1), "the plan has 1000000000 shards"),
    ],
)
def test_counts_that_no_set_has_are_refused_before_a_plan_is_made(counts, problem):
    with pytest.raises(ShardError, match=f"^{problem}"):
        ShardPlan(*counts)
