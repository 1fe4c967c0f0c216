"""Batches of entries for one process, read by loader processes while the device computes."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from pipeline.settings.training import TrainingSettings
from pipeline.system.children import bound_children, forkserver
from pipeline.system.device import is_accelerator
from pipeline.system.errors import UserError, first_line
from shards.dataset import Batch, EpochBatches, RoundBatches
from shards.schema import ShardError

# Far longer than a batch takes on a slow disk.
BATCH_SECONDS = 600.0


@dataclass(frozen=True)
class OneProcess:
    """In place of an accelerator: this process reads as if there were no others."""

    device: torch.device
    process_index: int = 0
    num_processes: int = 1


def batches(
    settings: TrainingSettings, dataset: Any, accelerator: Accelerator | OneProcess, position: int
) -> Generator[Batch, None, None]:
    """Batches of this process on its device, endlessly, from entry `position` of the stream on."""
    for batch in collated_batches(settings, dataset, accelerator, position):
        yield batch.to(accelerator.device)


def collated_batches(
    settings: TrainingSettings,
    dataset: Any,
    accelerator: Accelerator | OneProcess,
    position: int,
    order: Iterable[list[int]] | None = None,
) -> Generator[Any, None, None]:
    """This process's batches as `dataset.collate` makes them: those of an `order` of indices, or endlessly those from
    entry `position` on.

    Raises ShardError for an entry that cannot be read, and UserError if loader processes fail or give no batch within
    BATCH_SECONDS.
    """
    order = order_of(settings, dataset, accelerator, position) if order is None else order
    workers = settings.dataloader_num_workers
    if workers is None:
        # On a CPU, loader processes take more time from training than reading between the steps costs, unless a read
        # waits for an answer from elsewhere.
        workers = 2 if is_accelerator(accelerator.device) else int(dataset.in_flight > 1)
    pinned = accelerator.device.type == "cuda"
    if not workers:
        yield from DataLoader(dataset, batch_sampler=order, collate_fn=dataset.collate, pin_memory=pinned)
        return
    read = ReadElsewhere(dataset)
    with bound_children() as (bound, end_workers):
        loader: DataLoader[Any] = DataLoader(
            read,
            batch_sampler=order,
            collate_fn=read.collate,
            num_workers=workers,
            pin_memory=pinned,
            multiprocessing_context=forkserver(__name__),
            worker_init_fn=bound,
        )
        with loader_failures():
            stream = iter(loader)
        try:
            while True:
                # torch looks every few seconds whether its workers live. Those that are stuck must end for it to see.
                patience = threading.Timer(BATCH_SECONDS, end_workers)
                patience.daemon = True
                patience.start()
                with loader_failures():
                    batch = next(stream, None)
                patience.cancel()
                if batch is None:
                    return
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            # Its workers end in order while the pipe is still open.
            del stream


def order_of(
    settings: TrainingSettings, dataset: Any, accelerator: Accelerator | OneProcess, position: int
) -> EpochBatches:
    """The batches of this process, as indices, from entry `position` of all that are trained on."""
    kind = RoundBatches if settings.by_rounds else EpochBatches
    return kind(
        dataset.counts(),
        settings.train_batch_size,
        settings.seed,
        start=position,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulate=settings.gradient_accumulation_steps,
        rounds=dataset.rounds,
    )


@dataclass(frozen=True)
class ReadElsewhere(Dataset):
    """A dataset for loader processes: an error in reading is handed over in place of the batch, to be raised here.

    torch would raise another one, with the other process's traceback for its text.
    """

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The entries of a batch, which some datasets read at once."""
        read = getattr(self.dataset, "__getitems__", None)
        try:
            return read(indices) if read else [self.dataset[index] for index in indices]
        except (ShardError, OSError) as error:
            return [error]

    def collate(self, entries: list[Any]) -> Any:
        failed = next((entry for entry in entries if isinstance(entry, Exception)), None)
        return failed or self.dataset.collate(entries)


@contextmanager
def loader_failures() -> Iterator[None]:
    """Raise UserError in place of what torch raises when batches cannot be handed over."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(
            f"the loader processes failed ({first_line(error)}). They hand batches over in shared memory and open "
            "files: enlarge /dev/shm (`docker run --shm-size 8g`), raise `ulimit -n`, free memory, or use "
            "--dataloader-num-workers 0, which reads in the training process."
        ) from error
