"""The codec's promises: bounded, unbiased, never clipped, equal in numpy and torch, bounded in memory."""

import io
import math

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import codec, device_codec
from shards.schema import ShardError

SHAPE = (16, 24, 24)


def gaussian(seed: int = 0, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (scale * draw.standard_normal(SHAPE) + mean).astype(np.float32)


def awkward() -> dict[str, np.ndarray]:
    """Tensors that break careless quantisers."""
    outlier_channel, outlier_value = gaussian(), gaussian()
    outlier_channel[3] *= 1e6
    outlier_value[2, 5, 7] = 1e5
    offset_channels = gaussian() + 1e4 * np.arange(16, dtype=np.float32)[:, None, None]
    half_constant = gaussian()
    half_constant[8:] = 3.25
    return {
        "tiny": gaussian(scale=1e-8),
        "huge": gaussian(scale=1e8),
        "zeros": np.zeros(SHAPE, np.float32),
        "constant": np.full(SHAPE, -7.5, np.float32),
        "outlier channel": outlier_channel,
        "outlier value": outlier_value,
        "offset channels": offset_channels,
        "half constant": half_constant,
    }


def round_trip(x: np.ndarray, snr_db: float, offset: int = 0) -> tuple[np.ndarray, float]:
    q, mu, step = codec.quantise(x, snr_db, offset)
    data, raw_bytes = codec.pack_quantised(q, mu)
    q, mu = codec.unpack_quantised(data, raw_bytes)
    return codec.dequantise(q, mu, step, offset), float(step)


def rounding(x: np.ndarray) -> float:
    """What float32 arithmetic itself may add: some last places of the largest value."""
    return 8 * float(np.abs(x).max()) * 2.0**-24


@pytest.mark.parametrize("name", awkward())
@pytest.mark.parametrize("snr_db", [-5.0, 10.0, 40.0, codec.MAX_SNR_DB])
def test_error_never_exceeds_half_a_step_at_any_scale(name, snr_db):
    x = awkward()[name]
    decoded, step = round_trip(x, snr_db, offset=12345)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - x).max() <= step / 2 + rounding(x)


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.floats(-8, 8),
    mean=st.floats(-100, 100),
    snr_db=st.floats(-10, 60),
    seed=st.integers(0, 1000),
    offset=st.integers(0, codec.DITHER_TABLE_SIZE - 1),
)
def test_error_is_bounded_for_any_gaussian(exponent, mean, snr_db, seed, offset):
    x = gaussian(seed, 10.0**exponent, mean * 10.0**exponent)
    decoded, step = round_trip(x, snr_db, offset)
    assert np.abs(decoded - x).max() <= step / 2 + rounding(x)


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 20.0, 30.0])
def test_the_signal_to_noise_ratio_is_the_requested_one(snr_db):
    x = gaussian(mean=5.0)
    decoded, _ = round_trip(x, snr_db)
    signal = x - x.mean(axis=(1, 2), keepdims=True)
    measured = 10 * math.log10(np.mean(signal**2) / np.mean((decoded - x) ** 2))
    assert measured == pytest.approx(snr_db, abs=0.25)


@pytest.mark.parametrize("snr_db", [0.0, 10.0])
def test_error_is_uncorrelated_with_the_signal_and_zero_mean_over_dither(snr_db):
    x = gaussian()
    offsets = np.random.default_rng(1).integers(codec.DITHER_TABLE_SIZE, size=64)
    errors = np.stack([round_trip(x, snr_db, int(offset))[0] - x for offset in offsets])
    step = round_trip(x, snr_db)[1]
    # Uniform on a step: variance step^2 / 12. Five standard deviations of each mean.
    sigma = step / math.sqrt(12)
    assert abs(errors.mean()) < 5 * sigma / math.sqrt(errors.size)
    assert np.abs(errors.mean(axis=0)).max() < 6 * sigma / math.sqrt(len(offsets))
    correlation = np.corrcoef(errors.reshape(-1), np.tile(x.reshape(-1), len(offsets)))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(errors.size)
    assert errors.var() == pytest.approx(sigma**2, rel=0.02)


@pytest.mark.parametrize("name", ["gaussian", *awkward()])
@pytest.mark.parametrize("snr_db", [0.0, 20.0, codec.MAX_SNR_DB])
def test_torch_equals_the_numpy_reference(name, snr_db):
    x = awkward().get(name, gaussian())
    offset = codec.DITHER_TABLE_SIZE - 100  # The dither wraps round.
    q, mu, step = device_codec.quantise(torch.from_numpy(x)[None], snr_db, [offset])
    reference_q, reference_mu, reference_step = codec.quantise(x, snr_db, offset)
    np.testing.assert_allclose(mu[0].numpy(), reference_mu, rtol=1e-5, atol=rounding(x))
    assert step.item() == pytest.approx(float(reference_step), rel=1e-4, abs=0)
    decoded = device_codec.dequantise(q, mu, step, [offset])[0].numpy()
    np.testing.assert_array_equal(decoded, codec.dequantise(q[0].numpy(), mu[0].numpy(), step.item(), offset))
    assert np.abs(decoded - x).max() <= step.item() / 2 + rounding(x)


def test_torch_treats_each_entry_of_a_batch_alone():
    batch = np.stack([gaussian(0), gaussian(1, 1e6), np.zeros(SHAPE, np.float32), gaussian(2, 1e-6, 1.0)])
    offsets = [3, 99, 7, 2**20]
    q, mu, step = device_codec.quantise(torch.from_numpy(batch), 15.0, offsets)
    together = device_codec.dequantise(q, mu, step, offsets)
    for i, offset in enumerate(offsets):
        alone = device_codec.quantise(torch.from_numpy(batch[i : i + 1]), 15.0, [offset])
        torch.testing.assert_close(device_codec.dequantise(*alone, [offset])[0], together[i], rtol=1e-5, atol=1e-9)


def test_dither_is_uniform_and_the_same_for_ever():
    table = codec.dither_table()
    assert table.min() == -0.5
    assert table.max() == 0.5 - 2.0**-16
    histogram = np.histogram(table, bins=64)[0]
    assert np.abs(histogram / histogram.mean() - 1).max() < 0.02
    # Part of the format: caches on disk are decoded with these very values.
    np.testing.assert_array_equal(table[:4] * 65536, DITHER_HEAD)


DITHER_HEAD = np.array([17703, 28980, -24324, 13598])


@pytest.mark.parametrize(("low", "high", "planes"), [(-128, 127, 1), (-129, 0, 2), (0, 32767, 2), (0, 32768, 4)])
def test_q_takes_as_many_byte_planes_as_it_needs(low, high, planes):
    q = np.zeros((2, 3, 5), np.int32)
    q[0, 0, 0], q[1, 2, 4] = low, high
    mu = np.array([1.5, -2.0], np.float32)
    data, raw_bytes = codec.pack_quantised(q, mu)
    unpacked, unpacked_mu = codec.unpack_quantised(data, raw_bytes)
    assert unpacked.dtype.itemsize == planes
    np.testing.assert_array_equal(unpacked, q)
    np.testing.assert_array_equal(unpacked_mu, mu)


@pytest.mark.parametrize(("snr_db", "overhead"), [(10.0, 0.45), (15.0, 0.2), (20.0, 0.15)])
def test_coding_costs_little_over_the_entropy(snr_db, overhead):
    x = np.random.default_rng(0).standard_normal((320, 32, 32)).astype(np.float32)
    q, mu, step = codec.quantise(x, snr_db, 0)
    data, _ = codec.pack_quantised(q, mu)
    # h(q | u) = h(x + uniform) - log2(step), for a Gaussian of that variance.
    entropy = 0.5 * math.log2(2 * math.pi * math.e * (1 + float(step) ** 2 / 12)) - math.log2(float(step))
    bits = 8 * (len(data) - mu.nbytes) / x.size
    assert entropy - 0.05 < bits < entropy + overhead


class TestDamage:
    """Nothing wrong is decoded, and nothing is allocated on a hostile header's word."""

    def packed(self) -> tuple[bytes, int]:
        q, mu, _ = codec.quantise(gaussian(), 10.0, 0)
        return codec.pack_quantised(q, mu)

    @pytest.mark.parametrize("position", [5, 100, -1])
    def test_a_flipped_bit_is_seen(self, position):
        data, raw_bytes = self.packed()
        damaged = bytearray(data)
        damaged[position] ^= 4
        with pytest.raises(ShardError):
            codec.unpack_quantised(bytes(damaged), raw_bytes)

    def test_a_cut_frame_is_seen(self):
        data, raw_bytes = self.packed()
        with pytest.raises(ShardError, match="damaged"):
            codec.unpack_quantised(data[:-10], raw_bytes)

    def test_another_frame_behind_the_first_is_seen(self):
        data, raw_bytes = self.packed()
        with pytest.raises(ShardError):
            codec.unpack_quantised(data + data, raw_bytes)

    def test_a_bomb_is_refused_before_it_is_unpacked(self):
        bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
        assert len(bomb) < 1 << 17
        with pytest.raises(ShardError, match="states 1073741824 bytes"):
            codec.unpack_quantised(bomb, 5000)

    def test_a_frame_of_no_stated_size_is_refused(self):
        compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        data = compressor.compress(bytes(5000)) + compressor.flush()
        with pytest.raises(ShardError, match="states"):
            codec.unpack_quantised(data, 5000)

    def test_a_header_that_claims_more_than_there_is_allocates_nothing(self):
        data = codec.encode_npy(np.zeros(4, np.float32)).replace(b"(4,), ", b"(4000000000,), ")
        with pytest.raises(ShardError, match="states shape|no valid"):
            codec.decode_npy(data)

    def test_objects_are_refused(self):
        stream = io.BytesIO()
        np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with pytest.raises(ShardError):
            codec.decode_npy(stream.getvalue())

    @pytest.mark.parametrize("data", [b"", b"garbage", b"\x93NUMPY\x09\x00", codec.encode_npy(np.zeros(3)) + b"x"])
    def test_anything_but_an_array_is_refused(self, data):
        with pytest.raises(ShardError):
            codec.decode_npy(data)


@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "u1", "<i8"])
def test_an_array_is_written_as_numpy_writes_it(shape, dtype):
    array = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    assert codec.encode_npy(array) == stream.getvalue()


def test_exact_arrays_come_back_equal():
    for array in (gaussian().astype(np.float16), np.float32(gaussian()), np.arange(5)):
        decoded = codec.decode_npy(codec.encode_npy(array))
        assert decoded.dtype == array.dtype
        np.testing.assert_array_equal(decoded, array)


def test_dither_goes_round_the_table_on_every_device():
    """Also more than once, for tensors with more values than the table."""
    shape, offset = (2, 1500, 1500), codec.DITHER_TABLE_SIZE - 5
    expected = codec.dither(offset, shape)
    assert expected.size > codec.DITHER_TABLE_SIZE
    assert np.array_equal(device_codec.dither([offset], shape, torch.device("cpu"))[0].numpy(), expected)
