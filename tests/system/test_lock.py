"""The lock on an output directory: one training at a time, jobs that write shards together, none left by a kill."""

import errno
import fcntl
import multiprocessing
import os
import re
import signal

import pytest

from pipeline.system import lock as lock_module
from pipeline.system.errors import UserError
from pipeline.system.lock import OutputLock

FORK = multiprocessing.get_context("fork")


def hold(out, ready):
    with OutputLock(out) as lock:
        lock.take()
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to tmp_path/out alone."""
    ready = FORK.Event()
    child = FORK.Process(target=hold, args=(tmp_path / "out", ready))
    child.start()
    ready.wait()
    yield child
    child.kill()
    child.join()


def test_a_second_writer_is_told_who_the_first_is(holder, tmp_path):
    with OutputLock(tmp_path / "out") as lock:
        with pytest.raises(UserError, match=rf"out is being written by process {holder.pid} on .*Wait until"):
            lock.take()
        with pytest.raises(UserError, match="is being written by"), lock.claim():
            pass


def test_a_killed_writer_leaves_no_lock(holder, tmp_path):
    holder.kill()
    holder.join()
    with OutputLock(tmp_path / "out") as lock:
        lock.take()
    assert os.listdir(tmp_path / "out") == []


def test_jobs_share_a_directory_and_know_whether_they_are_alone(tmp_path):
    with OutputLock(tmp_path) as first, OutputLock(tmp_path) as second:
        with first.claim() as alone:
            assert alone
        with second.claim() as alone:
            assert not alone
        with OutputLock(tmp_path) as training, pytest.raises(UserError, match="is being written by"):
            training.take()
        first.__exit__()
        with OutputLock(tmp_path) as third, third.claim() as alone:
            assert not alone
    with OutputLock(tmp_path) as lock, lock.claim() as alone:
        assert alone
    assert os.listdir(tmp_path) == []


def test_no_job_claims_a_directory_while_another_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock_module, "PATIENCE", 0.4)
    monkeypatch.setattr(lock_module, "SILENCE", 0.1)
    with (
        OutputLock(tmp_path) as first,
        OutputLock(tmp_path) as second,
        first.claim(),
        pytest.raises(UserError, match="is being written by"),
        second.claim(),
    ):
        pass
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert re.fullmatch(rf"waiting for process {os.getpid()} on \S+, which prepares {tmp_path}", told[0])


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_disk_without_locks_is_written_all_the_same(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with OutputLock(tmp_path) as first, OutputLock(tmp_path) as second:
        with first.claim() as alone:
            assert not alone
        second.take()
