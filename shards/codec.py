"""The feature codec of format 1 in numpy, its definition and its bytes; and what both formats share: the dither table,
zstd frames, and .npy members.

Subtractive dithered quantisation (Gray & Stockham, "Dithered quantizers", 1993), with zstd as the
entropy coder:

    step = sqrt(12 * 10^(-snr_db/10) * mean((x - mu)^2))     one per entry and tap; mu one per channel
    q    = round((x - mu) / step + u)                        u uniform in [-1/2, 1/2), known to both sides
    x'   = (q - u) * step + mu                               |x' - x| <= step/2; the error is independent of x

Nothing is clipped: `q` is stored in as many byte planes as its range needs.
"""

from __future__ import annotations

import functools
import io
import math
import threading
from collections.abc import Sequence

import numpy as np
import zstandard

from shards.schema import ShardError

CODECS = ("fp16", "fp32", "dither")
EXACT_DTYPES: dict[str, np.dtype] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
DITHER_TABLE_SIZE = 1 << 22
# Bytes of a .npy file before its header: magic, version, and the header's length in the last two.
NPY_PREAMBLE = 10
# Up to this, |q| stays below 2^24, where float32 represents every integer, for any tensor of 2^22 elements.
MAX_SNR_DB = 60.0
# zstd as an entropy coder: with the smallest hash table and the longest minimal match it hardly looks for matches,
# which are spurious in noise and cost bits.
ENTROPY_CODER = zstandard.ZstdCompressionParameters.from_level(1, hash_log=6, min_match=7, write_checksum=True)


@functools.cache
def dither_table() -> np.ndarray:
    """(2^22,) float32 in [-1/2, 1/2), multiples of 2^-16: part of the format, the same everywhere.

    It is made of a counter-based generator's raw bits, because numpy guarantees that those never change.
    """
    bits = np.random.Philox(key=0xD17AE5).random_raw(DITHER_TABLE_SIZE // 4)
    integers = bits.astype("<u8").view("<u2")
    return (integers.astype(np.float32) - np.float32(32768)) / np.float32(65536)


def dither(offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """The dither of one tensor: `shape` consecutive values of the table from `offset` on, wrapping around."""
    table = dither_table()
    return np.take(table, np.arange(offset, offset + math.prod(shape)), mode="wrap").reshape(shape)


def quantise(x: np.ndarray, snr_db: float, offset: int) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """x (C, H, W) float32 -> q (C, H, W) int32, mu (C,) float32, step float32 (0 where x is constant)."""
    mu = x.mean(axis=(1, 2), dtype=np.float32)
    q, step = quantise_centred(x - mu[:, None, None], snr_db, offset)
    return q, mu, step


def quantise_centred(centred: np.ndarray, snr_db: float, offset: int) -> tuple[np.ndarray, np.float32]:
    """(C, H, W) float32 whose power is the signal's -> q (C, H, W) int32, step float32 (0 where all is 0)."""
    peak = np.abs(centred).max(initial=0)
    # Relative to the peak, the squares neither overflow nor underflow at any scale.
    power = np.mean(np.square(centred / peak)) if peak > 0 else 0.0
    step = np.float32(math.sqrt(12.0 * 10.0 ** (-snr_db / 10.0) * power) * peak)
    if step == 0:
        return np.zeros(centred.shape, np.int32), step
    return np.rint(centred / step + dither(offset, centred.shape)).astype(np.int32), step


def dequantise(q: np.ndarray, mu: np.ndarray, step: float, offset: int) -> np.ndarray:
    """q (C, H, W) integers, mu (C,), step -> x' (C, H, W) float32."""
    return (q.astype(np.float32) - dither(offset, q.shape)) * np.float32(step) + mu[:, None, None]


def smallest_integer_dtype(low: int, high: int) -> np.dtype:
    """The narrowest of int8, int16, int32 that holds every value from `low` to `high`."""
    return next(d for d in map(np.dtype, ("<i1", "<i2", "<i4")) if low >= np.iinfo(d).min and high <= np.iinfo(d).max)


def pack_quantised(q: np.ndarray, mu: np.ndarray) -> tuple[bytes, int]:
    """q (C, H, W) integers and mu (C,) float32 -> the member's bytes, and their size uncompressed.

    One zstd frame holds two .npy arrays in a row: mu, then the byte planes of q, (planes, C, H, W) uint8, least
    significant first (a plane of high bytes is nearly constant and costs little). A zstd block ends between the two,
    so that the bytes of mu do not affect the code lengths of q. The frame has a checksum.
    """
    narrow = q.astype(smallest_integer_dtype(int(q.min()), int(q.max())), copy=False)
    planes = np.moveaxis(np.ascontiguousarray(narrow)[..., None].view(np.uint8), -1, 0)
    head, body = encode_npy(mu), encode_npy(planes)
    raw_bytes = len(head) + len(body)
    return compress([head, body]), raw_bytes


def unpack_quantised(data: bytes | memoryview, raw_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack_quantised`: q (C, H, W) int8, int16 or int32, and mu (C,) float32.

    Raises ShardError if the frame is damaged, or if it states another size than `raw_bytes`, before anything of that
    size is allocated.
    """
    raw = decompress(data, raw_bytes)
    mu, rest = _take_npy(memoryview(raw))
    planes, rest = _take_npy(rest)
    if rest or mu.dtype != np.float32 or mu.ndim != 1 or planes.dtype != np.uint8 or planes.ndim != 4:
        raise ShardError("the member does not hold exactly one mu and one q")
    if planes.shape[0] not in (1, 2, 4) or planes.shape[1] != mu.shape[0]:
        raise ShardError(f"q has shape {planes.shape}, which does not fit mu of shape {mu.shape}")
    if planes.shape[0] == 1:
        return planes[0].view(np.int8), mu
    integers = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(f"<i{planes.shape[0]}")
    return integers[..., 0], mu


def compress(parts: Sequence[bytes]) -> bytes:
    """One zstd frame of `parts`, at least one. A block ends between two of them, so that each has its own code lengths.

    The frame states its size and has a checksum.
    """
    frame = _compressor(threading.get_ident()).compressobj(size=sum(map(len, parts)))
    blocks = [frame.compress(part) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for part in parts[:-1]]
    return b"".join(blocks) + frame.compress(parts[-1]) + frame.flush()


def decompress(data: bytes | memoryview, raw_bytes: int) -> bytes:
    """Decompress exactly one zstd frame of `raw_bytes` bytes. Raises ShardError for anything else."""
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        if stated != raw_bytes:
            raise ShardError(f"a zstd frame states {stated} bytes, but the index states {raw_bytes}")
        return _decompressor(threading.get_ident()).decompress(data, max_output_size=raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ShardError(f"a zstd frame is damaged ({error})") from None


# One per thread, since they must not be shared. Making one takes longer than coding most members.
@functools.lru_cache(maxsize=64)
def _compressor(thread: int) -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(compression_params=ENTROPY_CODER)


@functools.lru_cache(maxsize=64)
def _decompressor(thread: int) -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor()


def encode_npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file, as numpy.save writes them for an array in C order."""
    return _npy_head(array.shape, array.dtype) + array.tobytes()


@functools.lru_cache(maxsize=1024)
def _npy_head(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


def decode_npy(data: bytes | memoryview) -> np.ndarray:
    """A read-only array over `data`, which must be exactly one .npy file. Raises ShardError otherwise."""
    array, rest = _take_npy(memoryview(data))
    if rest:
        raise ShardError(f"{len(rest)} bytes follow the array")
    return array


def _take_npy(data: memoryview) -> tuple[np.ndarray, memoryview]:
    """The array at the start of `data`, without a copy, and the rest.

    numpy's own reader allocates what the header claims. Here the claim is checked against the length of `data`.
    """
    start = NPY_PREAMBLE + int.from_bytes(data[NPY_PREAMBLE - 2 : NPY_PREAMBLE], "little")
    shape, dtype = _npy_header(bytes(data[:start]))
    count = math.prod(shape)
    if len(data) - start < count * dtype.itemsize:
        raise ShardError(f"an array states shape {shape} of {dtype}, but only {len(data) - start} bytes follow")
    end = start + count * dtype.itemsize
    return np.frombuffer(data[start:end], dtype).reshape(shape), data[end:]


@functools.lru_cache(maxsize=1024)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype in a .npy header of format 1.0. Cached: numpy takes longer to parse it than to read most
    arrays."""
    stream = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ShardError("an array is not in .npy format 1.0")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except ShardError:
        raise
    except ValueError as error:
        raise ShardError(f"an array has an invalid .npy header ({error})") from None
    if fortran_order or dtype.hasobject or dtype.itemsize == 0:
        raise ShardError(f"an array states {dtype}, fortran_order {fortran_order}, which this format does not use")
    return shape, dtype
