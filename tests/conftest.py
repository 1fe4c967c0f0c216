"""Fixtures for all tests: small random models and images. Nothing here needs a network or a GPU.

The libraries are imported where they are used: a process that only hands out tests to others loads none of them.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# Until the tests are collected: collections would look through all that the libraries make, and all of it stays.
gc.disable()
LONGEST = (
    "test_docs.py",
    "test_kill.py",
    "test_cli.py",
    "test_distill.py",
    "test_options.py",
    "test_sdxl.py",
    "test_stops.py",
    "test_export.py",
    "test_export_sdxl.py",
    "test_report.py",
    "test_evaluate.py",
    "test_teacher_cache.py",
    "test_endings.py",
)
TWO_LEVELS = ("sd_small", "sd_tiny")


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
def xl_teacher(tmp_path_factory) -> Path:
    """An SDXL teacher's folder in diffusers layout."""
    from support.tiny import tiny_xl_pipeline

    folder = tmp_path_factory.mktemp("xl-teacher")
    tiny_xl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    from support.tiny import write_images

    return write_images(tmp_path_factory.mktemp("images"), 13)


@pytest.fixture(scope="session")
def latents(teacher, images, tmp_path_factory) -> Path:
    """The images, encoded. What tests share is only read: one that changes it works on a copy."""
    from support.stages import run_encode

    return run_encode(teacher, images, tmp_path_factory.mktemp("encoded") / "latents")


@pytest.fixture(scope="session")
def cache(teacher, latents, tmp_path_factory) -> Path:
    """A cache as the defaults make it, quantised and sampled, of two rounds and for two levels."""
    from support.stages import run_teacher_cache

    return run_teacher_cache(teacher, latents, tmp_path_factory.mktemp("cached") / "cache", students=TWO_LEVELS)


@pytest.fixture(scope="session")
def cache_of_one_round(teacher, latents, tmp_path_factory) -> Path:
    from support.stages import run_teacher_cache

    place = tmp_path_factory.mktemp("one-round")
    return run_teacher_cache(teacher, latents, place / "cache", rounds=1, students=TWO_LEVELS)


@pytest.fixture(scope="module")
def few_steps() -> Iterator[None]:
    """Images take two steps where no option says how many, and the passes of a report are timed once."""
    from pipeline.commands import distill
    from pipeline.sampling.generate import Sampler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "TURNS", 1)
        patch.setattr(Sampler.__init__, "__defaults__", (2, *Sampler.__init__.__defaults__[1:]))
        yield


@pytest.fixture(scope="module")
def sides_in_steps_of_eight() -> Iterator[None]:
    """`encode --buckets` at 32 px has 40 x 24, 32 x 32 and 24 x 40 px (height x width), which tiny networks take."""
    from pipeline.core import buckets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "STEP", 8)
        yield


@pytest.fixture(scope="module")
def remembered_evaluations() -> Iterator[None]:
    """What is evaluated from configs alone is computed once."""
    from support.remembered import remember_evaluations

    with pytest.MonkeyPatch.context() as patch:
        remember_evaluations(patch)
        yield


@pytest.fixture(scope="session")
def s3_server():
    """An S3 server on the loopback, seen through a proxy. See support/buckets.py."""
    from support.buckets import s3_server

    with s3_server() as bucket:
        yield bucket


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """The server, with an empty bucket `bucket`, no faults, and retries that do not wait."""
    from support.buckets import environment

    from shards import remote_store

    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_store, "WAITS", (0.0, 0.0))
    s3_server.reset()
    files = remote_store.file_system("s3", os.getpid())
    if files.exists("bucket"):
        files.rm("bucket", recursive=True)
    files.mkdir("bucket")
    s3_server.reset()
    yield s3_server
    s3_server.reset()
