"""Commands in two processes, as torchrun starts them."""

import multiprocessing
import os
import shlex
import socket
from contextlib import redirect_stderr, redirect_stdout

import torch

from pipeline.cli import main


def in_two_processes(lines, cwd):
    """Run commands in two processes with the variables that torchrun sets. Returns what they print.

    They are forked from this process, which has the libraries loaded already.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=as_rank, args=(rank, shared, lines, cwd)) for rank in ("0", "1")]
    for child in children:
        child.start()
    for child in children:
        child.join()
    texts = [(cwd / f"rank-{rank}.txt").read_text() for rank in ("0", "1")]
    assert [child.exitcode for child in children] == [0, 0], texts
    return "".join(texts)


def as_rank(rank, shared, lines, cwd):
    """One process of several."""
    torch.set_num_threads(1)
    os.environ.update(shared, RANK=rank, LOCAL_RANK=rank)
    os.chdir(cwd)
    with open(f"rank-{rank}.txt", "w") as output, redirect_stdout(output), redirect_stderr(output):
        for line in lines:
            main(shlex.split(line), standalone_mode=False)
