"""Local files and directories: complete or absent, readable as others are, with errors that name them."""

import errno
import os
import shutil
import stat
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from shards import files
from shards.files import LEFTOVER, atomic_directory, atomic_file, fsync_directory, new_file, partial_name, write_bytes


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def umask(request):
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_files_of_other_libraries_get_the_modes_of_new_files(umask, tmp_path):
    """safetensors makes its files readable to their owner alone; `touch` and `mkdir` say what is usual."""
    subprocess.run(["touch", tmp_path / "touched"], check=True)
    subprocess.run(["mkdir", tmp_path / "made"], check=True)
    with atomic_directory(tmp_path / "folder") as folder:
        (folder / "part").mkdir(mode=0o700)
        save_file({"a": torch.zeros(2)}, folder / "part" / "a.safetensors")
        (folder / "a.sh").touch()
        (folder / "a.sh").chmod(0o700)
    with atomic_file(tmp_path / "b.safetensors") as stream:
        save_file({"a": torch.zeros(2)}, stream.name)
    usual = mode(tmp_path / "touched")
    assert mode(tmp_path / "folder" / "part" / "a.safetensors") == usual
    assert mode(tmp_path / "b.safetensors") == usual
    assert mode(tmp_path / "folder") == mode(tmp_path / "folder" / "part") == mode(tmp_path / "made")
    assert mode(tmp_path / "folder" / "a.sh") == usual | 0o700


def test_a_copy_of_read_only_files_can_be_written_and_removed(tmp_path):
    (tmp_path / "source" / "part").mkdir(parents=True)
    (tmp_path / "source" / "part" / "a").touch(mode=0o444)
    (tmp_path / "source" / "part").chmod(0o555)
    with atomic_directory(tmp_path / "copy") as folder:
        shutil.copytree(tmp_path / "source", folder, dirs_exist_ok=True)
    assert mode(tmp_path / "copy" / "part") & 0o700 == 0o700
    (tmp_path / "source" / "part").chmod(0o755)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_directories_is_written_all_the_same(number, tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(tmp_path / "file", b"data")
    with atomic_directory(tmp_path / "folder") as folder:
        (folder / "a").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file", "folder"]


def test_a_directory_that_fails_to_sync_is_an_error(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        fsync_directory(tmp_path)


def test_a_disk_that_fills_up_under_a_copied_tree_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    for name in ("a", "b"):
        (tmp_path / "source" / name).write_bytes(b"data")

    def full(source, target, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left") as caught, atomic_directory(tmp_path / "copy") as folder:
        shutil.copytree(tmp_path / "source", folder, dirs_exist_ok=True, copy_function=full)
    assert type(caught.value) is OSError
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "copy"))
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("gone", ["renamed", "deleted"])
def test_a_directory_that_goes_while_it_is_written_is_named(gone, tmp_path):
    out = tmp_path / "out"
    out.mkdir()

    def write():
        with atomic_file(out / "s00000.tar") as stream:
            stream.write(b"data")
            shutil.rmtree(out) if gone == "deleted" else out.rename(tmp_path / "elsewhere")

    with pytest.raises(FileNotFoundError) as caught:
        write()
    assert caught.value.filename == str(out / "s00000.tar")
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    with pytest.raises(FileNotFoundError) as caught:
        write_bytes(out / "s00001.tar", b"data")
    assert caught.value.filename == str(out / "s00001.tar")


def test_a_failed_write_names_the_file(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="No space") as caught, atomic_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file")


def test_an_existing_directory_is_named_and_kept(tmp_path):
    write_bytes(tmp_path / "old", b"")
    (tmp_path / "samples").mkdir()
    (tmp_path / "old").rename(tmp_path / "samples" / "old")
    with pytest.raises(FileExistsError) as caught, atomic_directory(tmp_path / "samples") as folder:
        (folder / "new").touch()
    assert caught.value.filename == str(tmp_path / "samples")
    assert os.listdir(tmp_path / "samples") == ["old"]


def test_containers_of_one_host_name_and_process_id_do_not_share_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files.socket, "gethostname", lambda: "worker")
    monkeypatch.setattr(os, "getpid", lambda: 7)
    names = {partial_name(tmp_path / "s00000.tar").name for _ in range(100)}
    assert len(names) == 100
    for name in (*names, ".s00000.tar.worker.7.partial"):
        assert LEFTOVER.fullmatch(name).groups() == ("worker", "7")


def write_new(path, data):
    with new_file(path) as stream:
        stream.write(data)


@pytest.mark.parametrize("links", [True, False])
def test_the_first_of_several_writers_wins(tmp_path, monkeypatch, links):
    def no_link(*paths):
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    write_new(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]
