"""Fixtures for all tests: small random models and images. Nothing here needs a network or a GPU.

The libraries are imported where they are used: a process that only hands out tests to others loads none of them.
"""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# Until the tests are collected: collections would look through all that the libraries make, and all of it stays.
gc.disable()
LONGEST = ("test_docs.py", "test_kill.py", "test_cli.py", "test_distill.py", "test_options.py")


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps one state per process. Each test gets its own."""
    from accelerate.state import AcceleratorState, PartialState

    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files go first, so that neither of two processes is left with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What the libraries made at import stays: collections need not look through it again, and there are many.

    The server of processes starts now, where the libraries are loaded and no test has patched them.
    """
    gc.freeze()
    if "pipeline.system.children" in sys.modules:
        from support import forkserver

        forkserver.start()
    gc.enable()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A teacher's folder in diffusers layout."""
    from support.tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("teacher")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def v_teacher(tmp_path_factory) -> Path:
    from support.tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("v-teacher")
    tiny_pipeline(prediction_type="v_prediction").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    from support.tiny import write_images

    return write_images(tmp_path_factory.mktemp("images"), 13)
