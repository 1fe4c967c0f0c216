"""A threaded map and a background producer that keep the order and never run far ahead."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Iterator[Result]:
    """Yield function(item) for each item, in order. At most `ahead` results are started but not yet consumed."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def in_background(items: Iterable[Item], ahead: int) -> Iterator[Item]:
    """Yield the same items, produced in one separate thread. At most `ahead` are started but not yet consumed.

    An exception from `items` is raised at the position of the failed item. Closing the iterator ends the thread after
    the item that it is producing. The thread has the current CUDA device of this one.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1, initializer=_current_device_setter())
    try:
        pending: deque[Future[Any]] = deque(pool.submit(next, iterator, end) for _ in range(ahead))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, iterator, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _current_device_setter() -> Callable[[], None] | None:
    """What gives another thread this one's current CUDA device; a new thread has device 0."""
    if not torch.cuda.is_initialized():
        return None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())
