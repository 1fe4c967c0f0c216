"""Real damage to a cache, one function a kind, and what comes of it when the cache is opened, read and verified."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zstandard
from click.testing import CliRunner

from pipeline.cli import main
from shards.cache import Cache
from shards.manifest import sha256_of_json
from shards.reader import StoredEntry
from shards.schema import MANIFEST, ShardError, sidecar_name
from shards.store import open_store
from support import sidecars

VICTIM, IMAGE_SHARD = "r0001-s00001.tar", "images/s00000.tar"
BLOCK = 512


@dataclass(frozen=True)
class Place:
    """A cache to be damaged, and another one, whole, of the same teacher with another seed."""

    cache: Path
    other: Path

    @property
    def tar(self) -> Path:
        return self.cache / VICTIM

    @property
    def sidecar(self) -> Path:
        return self.cache / sidecar_name(VICTIM)

    def located(self, member: str) -> tuple[int, int]:
        """(offset, length) of a member of the victim's first entry."""
        head, table = sidecars.load(self.sidecar)
        offset, length, *_ = table[0, sidecars.columns(head, member)].tolist()
        return offset, length


def cut(place: Place, length: int) -> None:
    place.tar.write_bytes(place.tar.read_bytes()[:length])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def unlink_and_flip(path: Path, position: int) -> None:
    """Flip a bit in a copy of a file that is linked to the latents' own."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    flip(path, position)


def cut_file(path: Path, length: int) -> None:
    data = path.read_bytes()[:length]
    path.unlink()
    path.write_bytes(data)


def forge(place: Place, tar: bytes, change: Callable[[dict, np.ndarray], None] = lambda head, table: None) -> None:
    """Put `tar` in the victim's place with a sidecar that vouches for it."""
    head, table = sidecars.load(place.sidecar)
    head |= {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}
    change(head, table)
    place.tar.write_bytes(tar)
    sidecars.save(place.sidecar, head, table)


def edit_header(place: Place, **changes) -> None:
    """Write another header over that of the first entry's noise, valid in itself."""
    offset, _ = place.located("noise.npy")
    tar = bytearray(place.tar.read_bytes())
    info = tarfile.TarInfo.frombuf(bytes(tar[offset - BLOCK : offset]), "utf-8", "surrogateescape")
    for name, value in changes.items():
        setattr(info, name, value)
    tar[offset - BLOCK : offset] = info.tobuf(tarfile.GNU_FORMAT)
    forge(place, bytes(tar))


def append_member(place: Place, name: str) -> None:
    """One more member behind the last."""
    tar = io.BytesIO(place.tar.read_bytes())
    with tarfile.open(fileobj=tar, mode="a") as archive:
        archive.addfile(tarfile.TarInfo(name))
    forge(place, tar.getvalue())


def replace_tap(place: Place, data: bytes, raw_bytes: int | None) -> None:
    """Put `data` over the head of a tap, its checksum right, and `raw_bytes` in the sidecar if given."""
    import zlib

    offset, length = place.located("tap.up_blocks.3.npy.zst")
    assert len(data) <= length
    tar = bytearray(place.tar.read_bytes())
    tar[offset : offset + len(data)] = data

    def vouch(head: dict, table: np.ndarray) -> None:
        columns = sidecars.columns(head, "tap.up_blocks.3.npy.zst")
        _, _, stated, _ = table[0, columns].tolist()
        table[0, columns] = offset, len(data), raw_bytes or stated, zlib.crc32(data)

    forge(place, bytes(tar), vouch)


@functools.cache
def bomb(size: int = 1 << 30) -> bytes:
    """A zstd frame of a few kilobytes at most that states `size` bytes, and holds them: zeros."""
    compressor = zstandard.ZstdCompressor(level=19).compressobj(size=size)
    zeros = bytes(1 << 20)
    parts = [compressor.compress(zeros) for _ in range(size >> 20)]
    return b"".join(parts) + compressor.flush()


def swap_members(place: Place) -> None:
    """Let the sidecar call the noise teacher_pred and the other way round: same shape, same type, right checksums."""
    head, table = sidecars.load(place.sidecar)
    a, b = (sidecars.columns(head, f"{name}.npy") for name in ("noise", "teacher_pred"))
    table[:, a], table[:, b] = table[:, b].copy(), table[:, a].copy()
    sidecars.save(place.sidecar, head, table)


def swap_shards(place: Place) -> None:
    """Let two shards of the cache change their names."""
    for name in (str, sidecar_name):
        a, b = place.cache / name(VICTIM), place.cache / name("r0001-s00000.tar")
        aside = a.with_suffix(".aside")
        a.rename(aside)
        b.rename(a)
        aside.rename(b)


def copy_from_other(place: Place, *names: str) -> None:
    for name in names:
        (place.cache / name).write_bytes((place.other / name).read_bytes())


def repeat_shard(place: Place) -> None:
    """The shard of the round before in the victim's place, with a sidecar that says it belongs there."""
    earlier = VICTIM.replace("r0001", "r0000")
    head, table = sidecars.load(place.cache / sidecar_name(earlier))
    place.tar.write_bytes((place.cache / earlier).read_bytes())
    sidecars.save(place.sidecar, {**head, "shard": VICTIM}, table)


def repeat_neighbour(place: Place) -> None:
    """The shard before in the victim's place, with a sidecar that says it belongs there."""
    neighbour = "r0001-s00000.tar"
    head, table = sidecars.load(place.cache / sidecar_name(neighbour))
    place.tar.write_bytes((place.cache / neighbour).read_bytes())
    sidecars.save(place.sidecar, {**head, "shard": VICTIM}, table)


def drop_entry(place: Place) -> None:
    """Let the sidecar list one entry less."""
    head, table = sidecars.load(place.sidecar)
    sidecars.save(place.sidecar, head, table[:-1])


def change_table(place: Place, column: int) -> None:
    """Let the sidecar state another number in a column of its first entry."""
    head, table = sidecars.load(place.sidecar)
    table[0, column] += 1
    sidecars.save(place.sidecar, head, table)


def change_manifest(place: Place, **changes) -> None:
    path = place.cache / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_manifest(place: Place, *, rehash: bool) -> None:
    path = place.cache / MANIFEST
    content = json.loads(path.read_text())
    content["spec"]["prediction_type"] = "v_prediction"
    if rehash:
        content["spec_sha256"] = sha256_of_json(content["spec"])
    path.write_text(json.dumps(content))


def other_bytes_of_the_same_size(place: Place) -> None:
    """The tar of another cache, cut or filled up to the size that the sidecar states."""
    size = place.tar.stat().st_size
    place.tar.write_bytes((place.other / VICTIM).read_bytes()[:size].ljust(size, b"\0"))


NOISE, TAP = "noise.npy", "tap.up_blocks.3.npy.zst"
# What is done, and to which file; where it is the manifest, all shards are kept.
DAMAGES: dict[str, tuple[Callable[[Place], None], str]] = {
    "tar cut at a member's border": (lambda p: cut(p, p.located(NOISE)[0] - BLOCK), VICTIM),
    "tar cut in a header": (lambda p: cut(p, p.located(NOISE)[0] - 100), VICTIM),
    "tar cut in a member's data": (lambda p: cut(p, p.located(NOISE)[0] + 300), VICTIM),
    "tar emptied": (lambda p: cut(p, 0), VICTIM),
    "tar gone": (lambda p: p.tar.unlink(), VICTIM),
    "a bit flipped in a tensor": (lambda p: flip(p.tar, p.located(NOISE)[0] + 400), VICTIM),
    "a bit flipped in a tap": (lambda p: flip(p.tar, p.located(TAP)[0] + 40), VICTIM),
    "a bit flipped in a .json": (lambda p: flip(p.tar, p.located("json")[0] + 10), VICTIM),
    "a bit flipped in a header": (lambda p: flip(p.tar, p.located(NOISE)[0] - BLOCK + 3), VICTIM),
    "a bit flipped in the padding": (lambda p: flip(p.tar, p.tar.stat().st_size - 1), VICTIM),
    "shard of another cache": (lambda p: copy_from_other(p, VICTIM, sidecar_name(VICTIM)), VICTIM),
    "tar of another cache": (other_bytes_of_the_same_size, VICTIM),
    "shard of another round": (repeat_shard, VICTIM),
    "shard of the neighbour, renamed": (repeat_neighbour, VICTIM),
    "two shards swapped": (swap_shards, VICTIM),
    "sidecar gone": (lambda p: p.sidecar.unlink(), VICTIM),
    "sidecar cut in its head": (lambda p: p.sidecar.write_bytes(p.sidecar.read_bytes()[:200]), VICTIM),
    "sidecar cut in its table": (lambda p: p.sidecar.write_bytes(p.sidecar.read_bytes()[:-100]), VICTIM),
    "a bit flipped in a sidecar's table": (lambda p: flip(p.sidecar, p.sidecar.stat().st_size - 20), VICTIM),
    "sidecar that names another image": (lambda p: change_table(p, 0), VICTIM),
    "sidecar that states another image's checksum": (lambda p: change_table(p, 1), VICTIM),
    "sidecar without its last entry": (drop_entry, VICTIM),
    "sidecar with two members swapped": (swap_members, VICTIM),
    "manifest edited": (lambda p: edit_manifest(p, rehash=False), MANIFEST),
    "manifest edited, with its hash": (lambda p: edit_manifest(p, rehash=True), MANIFEST),
    "manifest with fewer rounds": (lambda p: change_manifest(p, rounds=1), MANIFEST),
    "manifest without its files": (lambda p: change_manifest(p, files={}), MANIFEST),
    "manifest of another cache": (lambda p: copy_from_other(p, MANIFEST), MANIFEST),
    "tar with a member ../x": (lambda p: edit_header(p, name="../x"), VICTIM),
    "tar with an absolute member": (lambda p: edit_header(p, name="/tmp/x"), VICTIM),
    "tar with a link": (lambda p: edit_header(p, type=tarfile.SYMTYPE, linkname="/etc/passwd"), VICTIM),
    "tar with a member of 8 exbibytes": (lambda p: edit_header(p, size=(1 << 63) - 1), VICTIM),
    "tar with a member too many": (lambda p: append_member(p, "../../x"), VICTIM),
    "image: a bit flipped": (lambda p: unlink_and_flip(p.cache / IMAGE_SHARD, 2000), IMAGE_SHARD),
    "image: tar gone": (lambda p: (p.cache / IMAGE_SHARD).unlink(), IMAGE_SHARD),
    "image: sidecar cut": (lambda p: cut_file(p.cache / sidecar_name(IMAGE_SHARD), 200), IMAGE_SHARD),
    "zstd bomb": (lambda p: replace_tap(p, bomb(1 << 20), None), VICTIM),
    "zstd bomb that the sidecar vouches for": (lambda p: replace_tap(p, bomb(1 << 20), 1 << 20), VICTIM),
}


@dataclass
class Outcome:
    """What each look at a damaged cache said; an empty message where it saw nothing. `wrong` tensors were read."""

    opening: str = ""
    reading: str = ""
    fast: str = ""
    full: str = ""
    wrong: list[str] = field(default_factory=list)


def verify(cache: Path, *options: str) -> tuple[int, str]:
    """Exit status and output of `distill-sd verify`."""
    result = CliRunner().invoke(main, ["verify", str(cache), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def read_all(cache: Path) -> tuple[dict[str, StoredEntry], list[str]]:
    """Every entry that can be read, by key, and the messages of those that cannot."""
    opened = Cache(open_store(cache))
    found, messages = {}, []
    for index in range(len(opened)):
        try:
            sample = opened.read(index, opened.tensors)
            assert sample.key not in found, f"{sample.key} was read twice"
            found[sample.key] = sample
        except ShardError as error:
            messages.append(str(error))
    return found, messages


def look(cache: Path, whole: dict[str, StoredEntry]) -> Outcome:
    """Open, read and verify a damaged cache; `whole` is what it held before."""
    outcome = Outcome()
    try:
        found, messages = read_all(cache)
        outcome.reading = messages[0] if messages else ""
        outcome.wrong = [key for key, sample in found.items() if not same(sample, whole[key])]
    except ShardError as error:
        outcome.opening = str(error)
    for name, options in (("fast", ()), ("full", ("--full",))):
        status, output = verify(cache, *options)
        setattr(outcome, name, output if status else "")
    return outcome


def same(a: StoredEntry, b: StoredEntry) -> bool:
    return a.meta == b.meta and all(
        np.array_equal(tensor.values, b.tensors[name].values) and np.array_equal(tensor.mu, b.tensors[name].mu)
        if tensor.mu is not None
        else np.array_equal(tensor.values, b.tensors[name].values)
        for name, tensor in a.tensors.items()
    )
