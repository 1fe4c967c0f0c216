"""Threads keep the order, never run far ahead, and pass errors on."""

import threading
import time

import pytest
import torch

from pipeline.system.threads import in_background, ordered_map


def threads():
    return [thread.name for thread in threading.enumerate()]


def counting(taken, stop=10, fail_at=None):
    """Yield 0, 1, 2, ..., record in `taken` the items that were requested, and fail at item `fail_at`."""
    for i in range(stop):
        taken.append(i)
        if i == fail_at:
            raise OSError(f"item {i}")
        yield i


def test_a_map_keeps_the_order_at_any_speed():
    def slow_when_even(i):
        time.sleep(0.01 if i % 2 == 0 else 0)
        return i * i

    assert list(ordered_map(slow_when_even, range(20), 4, 6)) == [i * i for i in range(20)]


def test_a_map_never_runs_far_ahead():
    taken = []
    results = ordered_map(lambda i: i, counting(taken, 100), 2, 5)
    assert next(results) == 0
    assert len(taken) == 5


@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_background_items_are_complete_and_in_order(ahead):
    assert list(in_background(counting([]), ahead)) == list(range(10))
    assert list(in_background([], ahead)) == []


def test_another_thread_produces_items_while_the_consumer_works():
    makers = []

    def make():
        for i in range(4):
            makers.append(threading.current_thread())
            yield i

    for i in in_background(make(), 2):
        deadline = time.monotonic() + 10
        # The next two items are produced before they are requested.
        while len(makers) < min(i + 3, 4) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(makers) >= min(i + 3, 4)
    assert threading.current_thread() not in makers
    assert len(set(makers)) == 1


def test_the_background_never_runs_far_ahead():
    taken = []
    items = in_background(counting(taken, 100), 3)
    assert next(items) == 0
    time.sleep(0.05)
    assert len(taken) <= 4
    items.close()


def test_an_error_is_raised_at_the_position_of_its_item():
    items = in_background(counting([], fail_at=2), 5)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="item 2"):
        next(items)


def test_closing_the_iterator_ends_the_thread():
    before = threads()
    items = in_background(counting([], 1000), 2)
    next(items)
    items.close()
    assert threads() == before


def test_the_background_thread_has_the_current_gpu_of_its_consumer(monkeypatch):
    set_devices = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: set_devices.update({threading.get_ident(): index}))

    def makers():
        yield threading.get_ident()

    (maker,) = in_background(makers(), 1)
    assert set_devices == {maker: 3}
