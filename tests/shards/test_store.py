"""The local store: files appear complete or not at all, and nothing else in the package opens a path."""

import ast
import os
from pathlib import Path

import pytest

from shards.regular import NotRegularError
from shards.store import CHUNK, MAX_READ_BYTES, open_store, read_chunks

SHARDS = Path(__file__).parents[2] / "shards"
# Modules through which a path could be opened.
OPENERS = {"os", "io", "pathlib", "shutil", "tempfile"}


@pytest.fixture
def store(tmp_path):
    (tmp_path / "set").mkdir()
    return open_store(tmp_path / "set")


def test_a_directory_that_disappears_is_not_made_again(tmp_path):
    store = open_store(tmp_path / "gone")
    assert store.list() == []
    with pytest.raises(FileNotFoundError):
        write(store, "a", b"")
    assert not (tmp_path / "gone").exists()


def write(store, name, data):
    with store.write(name) as stream:
        stream.write(data)


def test_what_is_written_is_read_listed_and_deleted(store):
    assert store.list() == []
    assert not store.exists("b")
    assert store.size("b") is None
    write(store, "b", b"bytes")
    write(store, "a", b"")
    assert store.list() == ["a", "b"]
    assert (store.read("b"), store.size("b"), store.size("a")) == (b"bytes", 5, 0)
    write(store, "b", b"others")
    assert store.read("b") == b"others"
    store.delete("b")
    store.delete("b")
    assert store.list() == ["a"]
    with pytest.raises(FileNotFoundError):
        store.read("b")
    with pytest.raises(FileNotFoundError):
        store.read_ranges("b", [(0, 1)])


def interrupted_write(store, name):
    with store.write(name) as stream:
        stream.write(b"new")
        assert store.read(name) == b"old"
        raise RuntimeError("power cut")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(store):
    write(store, "a", b"old")
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted_write(store, "a")
    assert store.read("a") == b"old"
    assert os.listdir(store.directory) == ["a"]


def test_ranges_are_read_in_order_and_end_with_the_file(store):
    write(store, "a", bytes(range(10)))
    assert store.read_ranges("a", [(8, 5), (0, 2), (20, 3), (4, 0)]) == [b"\x08\x09", b"\x00\x01", b"", b""]


def test_a_short_read_is_continued(store, monkeypatch):
    write(store, "a", bytes(range(100)))
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: whole(descriptor, min(length, 7), offset))
    assert store.read_ranges("a", [(3, 50), (90, 50)]) == [bytes(range(3, 53)), bytes(range(90, 100))]


def test_chunks_make_up_the_file(store):
    data = os.urandom(2 * CHUNK + 5)
    write(store, "a", data)
    assert [len(chunk) for chunk in read_chunks(store, "a")] == [CHUNK, CHUNK, 5]
    assert b"".join(read_chunks(store, "a")) == data


@pytest.mark.parametrize("name", ["fifo", "device"])
def test_what_is_not_a_file_is_never_waited_for(store, tmp_path, name):
    if name == "fifo":
        os.mkfifo(store.directory / name)
    else:
        (store.directory / name).symlink_to("/dev/zero")
    assert not store.exists(name)
    for read in (store.read, lambda name: store.read_ranges(name, [(0, 10)])):
        with pytest.raises(NotRegularError, match=f"{name} is not a regular file") as caught:
            read(name)
        assert caught.value.filename == str(store.directory / name)


def test_a_file_of_no_end_is_not_read_whole(store, monkeypatch):
    with open(store.directory / "sparse", "wb") as stream:
        stream.truncate(MAX_READ_BYTES + 1)
    monkeypatch.setattr("shards.store.MAX_READ_BYTES", 100)
    with pytest.raises(OSError, match="sparse has more than 100 bytes"):
        store.read("sparse")
    assert store.read_ranges("sparse", [(MAX_READ_BYTES, 5)]) == [bytes(1)]


@pytest.mark.parametrize("path", sorted(SHARDS.glob("*.py")), ids=lambda path: path.stem)
def test_only_the_store_opens_paths(path):
    """`files` and `regular` hold the local store's primitives, which the pipeline uses for its own folders too. The
    remote store gathers what it uploads in a temporary file, and `location` tells paths from addresses."""
    if path.stem in ("store", "files", "regular", "remote_store", "location"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not sources & (OPENERS | {"shards.files"})
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not names & {"open_regular", "open_descriptor", "read_regular"}
    # The codec reads and writes .npy headers in memory.
    assert not imported & OPENERS - ({"io"} if path.stem == "codec" else set())
    assert "open" not in called
