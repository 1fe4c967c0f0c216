"""What child processes of the tests run. It imports little, because each of them imports it again."""

import os
import signal
import time

from torch.utils.data import Dataset

from shards.schema import ShardError


class Unsendable:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


class Numbers(Dataset):
    """Entry i is i; entry `bad` is what `make_bad` makes of it."""

    def __init__(self, make_bad=None):
        self.make_bad = make_bad

    rounds, in_flight = 1, 1

    def __len__(self):
        return 8

    def counts(self):
        return [8]

    def __getitem__(self, index):
        return self.make_bad() if self.make_bad and index == 0 else index

    def collate(self, entries):
        return [os.getpid(), entries]


def damaged():
    raise ShardError("s00000.tar is damaged. Delete it.")


def full():
    raise OSError(28, "No space left on device", "s00000.tar")


def stuck():
    time.sleep(60)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def wait_bound(bound):
    bound()
    time.sleep(60)
