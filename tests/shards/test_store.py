"""The local store: files appear complete or not at all, and nothing else in the package opens a path."""

import ast
import os
from pathlib import Path

import pytest

from shards.store import CHUNK, open_store, read_chunks

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


@pytest.mark.parametrize("path", sorted(SHARDS.glob("*.py")), ids=lambda path: path.stem)
def test_only_the_store_opens_paths(path):
    """`files` holds the local store's primitives, which the pipeline uses for its own folders too."""
    if path.stem in ("store", "files"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not sources & (OPENERS | {"shards.files"})
    # The codec reads and writes .npy headers in memory.
    assert not imported & OPENERS - ({"io"} if path.stem == "codec" else set())
    assert "open" not in called
