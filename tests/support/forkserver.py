"""multiprocessing's server of processes, forked from this process, which has the libraries loaded already.

A server is otherwise a new interpreter that imports them again, which takes longer than all that its children do. What
a server imports when it starts, and that its start prints nothing, is not proved with it: `tests/test_docs.py` runs the
demo, and `tests/training/test_stops.py` a process that is killed, with servers that are new interpreters.
"""

import os
import traceback
from collections.abc import Sequence
from multiprocessing import util
from unittest import mock

import torch

from pipeline.system.children import forkserver


def start() -> None:
    """Start the server as the commands do. Its children find what is imported and patched now."""
    with mock.patch.object(util, "spawnv_passfds", fork):
        forkserver()


def fork(_program: str, arguments: Sequence[str], passed: Sequence[int]) -> int:
    """In place of `spawnv_passfds`: run the code after -c in a fork that has these file descriptors and no others."""
    pid = os.fork()
    if pid:
        return pid
    try:
        # A pipe that stayed open here would never come to its end elsewhere.
        kept = sorted({0, 1, 2, *passed, os.sysconf("SC_OPEN_MAX")})
        for before, after in zip(kept, kept[1:], strict=False):
            os.closerange(before + 1, after)
        # A fork has none of its parent's threads, and would wait for them.
        torch.set_num_threads(1)
        exec(arguments[-1], {})
    except SystemExit:
        # The server leaves this way when its last client is gone.
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)
