"""Stops of all kinds: signals to a group, lost peers, loader processes that fail, kill -9. Nothing hangs or is left."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from support.children import Numbers, Unsendable, damaged, die, full, stuck, wait_bound
from support.stages import reset_accelerate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pipeline.distill import DistillSettings
from pipeline.system.children import bound_children, forkserver
from pipeline.system.errors import UserError
from pipeline.training import loader
from pipeline.training.accelerator import make_accelerator
from pipeline.training.peers import Peers
from shards.schema import ShardError

ROOT = Path(__file__).parent.parent.parent
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch):
    """Torch looks every five seconds whether its loader processes live."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))


@contextlib.contextmanager
def stream_of(dataset, tmp_path):
    settings = DistillSettings(
        cache="c", out=tmp_path, level="sd_small", train_batch_size=1, dataloader_num_workers=1, device="cpu"
    )
    accelerator = make_accelerator(settings)
    with contextlib.closing(loader.collated_batches(settings, dataset, accelerator, 0)) as stream:
        yield stream
    reset_accelerate()


def take_all(stream):
    for _ in range(9):
        next(stream)


def alive(pid):
    """Whether a process runs. A zombie, which waits for its parent to look, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids, within):
    deadline = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_signals_to_the_whole_group_leave_loader_processes_and_their_server_at_work(tmp_path):
    with stream_of(Numbers(), tmp_path) as stream:
        worker = next(stream)[0]
        server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in (worker, server):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        time.sleep(0.2)
        take_all(stream)
        assert alive(worker)
        assert alive(server)
    assert gone([worker], 10)


def test_a_batch_that_cannot_be_handed_over_ends_the_run_with_the_remedies(tmp_path):
    """As with a small /dev/shm or few open files, where torch prints a traceback and waits for ever."""
    with (
        stream_of(Numbers(Unsendable), tmp_path) as stream,
        pytest.raises(UserError, match="loader processes failed.*/dev/shm.*ulimit -n.*--dataloader-num-workers 0"),
    ):
        take_all(stream)


def test_a_killed_loader_process_is_told(tmp_path):
    """As by the system, when memory runs out."""
    with stream_of(Numbers(die), tmp_path) as stream, pytest.raises(UserError, match="loader processes failed"):
        take_all(stream)


def test_a_loader_process_that_is_stuck_ends_with_the_patience_for_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "BATCH_SECONDS", 1.0)
    with stream_of(Numbers(stuck), tmp_path) as stream, pytest.raises(UserError, match="loader processes failed"):
        take_all(stream)


@pytest.mark.parametrize(("bad", "kind"), [(damaged, ShardError), (full, OSError)])
def test_what_a_loader_process_cannot_read_is_told_as_without_one(tmp_path, bad, kind):
    with stream_of(Numbers(bad), tmp_path) as stream, pytest.raises(kind) as caught:
        take_all(stream)
    with pytest.raises(kind) as expected:
        bad()
    assert str(caught.value) == str(expected.value)


ORPHANS = """
import time
from multiprocessing import forkserver as server, resource_tracker as tracker
from pipeline.system.children import bound_children, forkserver

with bound_children() as (bound, _):
    pool = forkserver().Pool(1, initializer=bound)
    pool.apply_async(int).get()
    pool.apply_async(time.sleep, (60,))
    print(pool._pool[0].pid, server._forkserver._forkserver_pid, tracker._resource_tracker._pid, flush=True)
    time.sleep(60)
"""


def test_kill_9_leaves_no_children():
    main = subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in main.stdout.readline().split()]
    assert len(pids) == 3
    assert all(map(alive, pids))
    main.kill()
    main.wait()
    assert gone(pids, 10)


def test_children_end_with_the_block():
    with bound_children() as (bound, _):
        child = forkserver().Process(target=wait_bound, args=(bound,))
        child.start()
        assert child.is_alive()
    child.join(60)
    assert child.exitcode == 1


@dataclass
class Pair:
    """Two processes that run `body(rank, peers)`, joined by gloo."""

    body: object
    store: Path

    def __enter__(self):
        self.results = FORK.Queue()
        self.processes = [FORK.Process(target=self.run, args=(rank,)) for rank in (0, 1)]
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    def run(self, rank):
        torch.set_num_threads(1)
        store = f"file://{self.store}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        self.results.put((rank, self.body(rank, Peers(SimpleNamespace(num_processes=2)))))
        self.results.close()
        self.results.join_thread()
        os._exit(0)


def stop_asked_of_one(rank, peers):
    """The step at which a process stops, when process 1 is told to at its fifth."""
    step = 0
    while True:
        step += 1
        if peers.any(rank == 1 and step == 5):
            return step


def test_all_processes_stop_at_the_step_at_which_one_was_told_to(tmp_path):
    with Pair(stop_asked_of_one, tmp_path / "store") as pair:
        assert dict(pair.results.get(timeout=60) for _ in range(2)) == {0: 5, 1: 5}


def one_dies(rank, peers):
    peers.any(False)
    if rank == 1:
        os._exit(9)
    try:
        with peers.told_when_lost():
            peers.any(False)
    except UserError as error:
        return str(error)


def test_a_process_that_died_is_told_to_the_others(tmp_path):
    with Pair(one_dies, tmp_path / "store") as pair:
        rank, told = pair.results.get(timeout=60)
    assert rank == 0
    assert told.startswith("another process of this training ended or did not answer (")
    assert told.endswith("Then rerun the same command to resume from the last checkpoint.")


def test_a_process_that_does_not_answer_is_told_to_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.training.peers.STEP_PATIENCE", timedelta(seconds=2))
    with Pair(one_stops_answering, tmp_path / "store") as pair:
        rank, told = pair.results.get(timeout=60)
    assert rank == 0
    assert told.startswith("another process of this training ended or did not answer (")


def one_stops_answering(rank, peers):
    if rank == 1:
        time.sleep(60)
    try:
        with peers.told_when_lost():
            peers.any(False)
    except UserError as error:
        return str(error)


def test_other_errors_are_not_taken_for_a_lost_process():
    peers = Peers(SimpleNamespace(num_processes=1))
    with pytest.raises(RuntimeError, match="out of memory"), peers.told_when_lost():
        raise RuntimeError("CUDA out of memory")
