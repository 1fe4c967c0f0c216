"""Packing: lossless at any radius and shape, close to the entropy, and nothing damaged is unpacked."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import codec, packing
from shards.packing import CODERS, pack, unpack
from shards.schema import ShardError

EDGES = [0, 1, 2, 7, 8, 127, 128, 32767, 32768, 2**31 - 1]


def symbols(radii: list[int], positions: int = 24, seed: int = 0) -> np.ndarray:
    """(C, positions, 1) int64: a channel of each radius, which it reaches."""
    draw = np.random.default_rng(seed)
    q = np.stack([draw.integers(-radius, radius, positions, endpoint=True) for radius in radii])
    q[:, :1] = np.array(radii)[:, None] * draw.choice([-1, 1], (len(radii), 1))
    return q[:, :, None]


def returned(q: np.ndarray) -> np.ndarray:
    data, raw_bytes = pack(q)
    return unpack(data, raw_bytes, q.shape)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_every_radius_comes_back(dtype):
    q = symbols(EDGES).astype(dtype)
    back = returned(q)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, q)


@pytest.mark.parametrize(("radius", "dtype"), [(0, "i1"), (127, "i1"), (128, "i2"), (32767, "i2"), (32768, "i4")])
def test_integers_come_back_in_the_narrowest_type(radius, dtype):
    assert returned(symbols([0, 1, radius])).dtype == dtype


def test_the_lowest_integers_of_each_type_come_back():
    for low in (-128, -(2**15), -(2**31) + 1):
        q = np.array([low, 0, 1, 0]).reshape(2, 2, 1)
        np.testing.assert_array_equal(returned(q), q)


def test_integers_that_have_no_class_are_refused():
    for value in (-(2**31), 2**31):
        with pytest.raises(ValueError, match="beyond"):
            pack(np.full((1, 1, 1), value, np.int64))


@settings(max_examples=100, deadline=None)
@given(
    radii=st.lists(st.sampled_from(EDGES), max_size=12),
    height=st.integers(0, 7),
    width=st.integers(0, 7),
    seed=st.integers(0, 1000),
)
def test_packing_is_lossless(radii, height, width, seed):
    positions = height * width
    drawn = symbols(radii, positions, seed) if radii and positions else np.zeros((len(radii), positions, 1), np.int64)
    q = drawn.reshape(len(radii), height, width).astype(np.int32)
    np.testing.assert_array_equal(returned(q), q)


@pytest.mark.parametrize("shape", [(0, 4, 4), (5, 0, 3), (3, 1, 1), (1, 1, 1), (2, 3, 5)])
def test_shapes_without_values_and_with_few(shape):
    q = np.zeros(shape, np.int8)
    assert returned(q).shape == shape
    assert pack(q)[1] == shape[0]
    np.testing.assert_array_equal(returned(q + np.int8(1)), q + 1)


def test_equal_values_give_equal_bytes_whatever_their_type_and_layout():
    q = symbols([0, 1, 2, 7, 100])
    data = pack(q)
    assert pack(q.astype(np.int8)) == data
    assert pack(np.asfortranarray(q.astype(np.int16))) == data


def quiet(snr_db: float = 10.0) -> np.ndarray:
    """q of a tap after a rotation: independent channels of falling power."""
    x = np.random.default_rng(0).standard_normal((320, 8, 8)) * (np.arange(1, 321.0) ** -0.6)[:, None, None]
    return codec.quantise_centred(x.astype(np.float32), snr_db, 0)[0]


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 20.0])
def test_packing_is_close_to_the_entropy_of_the_channels(snr_db):
    q = quiet(snr_db)
    counts = [np.unique(channel, return_counts=True)[1] / channel.size for channel in q]
    # Of 64 values a channel, the empirical entropy is itself too low.
    entropy = float(np.mean([-(share * np.log2(share)).sum() for share in counts]))
    bits = 8 * len(pack(q)[0]) / q.size
    assert bits < entropy + 0.35
    if snr_db <= 10:
        assert bits < 0.8 * 8 * len(codec.pack_quantised(q, np.zeros(320, np.float32))[0]) / q.size


class TestDamage:
    """Nothing wrong is unpacked, and nothing is allocated on a hostile frame's word."""

    q = symbols([0, 1, 1, 7, 7, 100, 1000, 100000])

    def raw(self) -> bytearray:
        return bytearray(codec.decompress(*pack(self.q)))

    def unpack_raw(self, raw: bytes) -> np.ndarray:
        return unpack(codec.compress([bytes(raw)]), len(raw), self.q.shape)

    def test_the_classes_are_at_the_front(self):
        np.testing.assert_array_equal(self.unpack_raw(self.raw()), self.q)
        assert list(self.raw()[:8]) == [0, 1, 1, 2, 2, 3, 4, 5]

    def test_a_flipped_bit_is_seen_or_changes_nothing(self):
        """Some bits of a zstd frame mean nothing. The member's CRC-32 covers them too."""
        data, raw_bytes = pack(self.q)
        seen = 0
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 4
            try:
                np.testing.assert_array_equal(unpack(bytes(damaged), raw_bytes, self.q.shape), self.q)
            except ShardError:
                seen += 1
        assert seen >= len(data) - 5

    def test_a_cut_frame_is_seen_wherever_it_ends(self):
        data, raw_bytes = pack(self.q)
        for length in range(len(data)):
            with pytest.raises(ShardError):
                unpack(data[:length], raw_bytes, self.q.shape)

    def test_what_follows_the_frame_is_seen(self):
        data, raw_bytes = pack(self.q)
        for more in (b"x", data):
            with pytest.raises(ShardError):
                unpack(data + more, raw_bytes, self.q.shape)

    @pytest.mark.parametrize("shape", [(8, 23, 1), (8, 25, 1), (7, 24, 1), (9, 24, 1), (0, 0, 0), (8, 0, 1), (1, 1, 1)])
    def test_another_shape_is_refused(self, shape):
        data, raw_bytes = pack(self.q)
        with pytest.raises(ShardError):
            unpack(data, raw_bytes, shape)

    @pytest.mark.parametrize("raw_bytes", [-1, 0, 7, 100, 1 << 40])
    def test_another_size_is_refused(self, raw_bytes):
        with pytest.raises(ShardError):
            unpack(pack(self.q)[0], raw_bytes, self.q.shape)

    @pytest.mark.parametrize("channel", range(8))
    @pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 6, 255])
    def test_another_class_is_refused(self, channel, number):
        raw = self.raw()
        if raw[channel] == number:
            return
        raw[channel] = number
        with pytest.raises(ShardError):
            self.unpack_raw(raw)

    @pytest.mark.parametrize(("start", "lowest"), [(8, 3**5), (8 + 10, 15**2)])
    def test_a_byte_that_stands_for_no_digits_is_refused(self, start, lowest):
        for byte in range(lowest, 256):
            raw = self.raw()
            raw[start] = byte
            with pytest.raises(ShardError, match="do not stand for any"):
                self.unpack_raw(raw)

    def test_digits_past_the_last_value_are_refused(self):
        raw = self.raw()
        # 48 values in 10 bytes: the last two bytes have no fifth digit.
        raw[8 + 9] += 81 if raw[8 + 9] < 162 else -81
        with pytest.raises(ShardError, match="do not stand for any"):
            self.unpack_raw(raw)

    def test_bytes_more_or_less_are_refused(self):
        with pytest.raises(ShardError, match="its channels take"):
            self.unpack_raw(self.raw() + b"\0")
        with pytest.raises(ShardError, match="its channels take"):
            self.unpack_raw(self.raw()[:-1])

    def test_a_bomb_is_refused_before_it_is_unpacked(self):
        bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
        for raw_bytes in (1 << 28, 500):
            with pytest.raises(ShardError, match="states"):
                unpack(bomb, raw_bytes, self.q.shape)

    def test_a_frame_of_no_stated_size_is_refused(self):
        raw = bytes(self.raw())
        compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        with pytest.raises(ShardError, match="states"):
            unpack(compressor.compress(raw) + compressor.flush(), len(raw), self.q.shape)


def test_each_class_holds_what_the_one_before_cannot():
    assert list(CODERS) == [1, 2, 3, 4, 5]
    assert (np.diff(packing.RADII) > 0).all()
    for coder in CODERS.values():
        values = np.arange(-min(coder.radius, 40), min(coder.radius, 40) + 1)
        data = coder.pack(values)
        assert len(data) == coder.size(values.size)
        np.testing.assert_array_equal(coder.unpack(data, values.size), values)
