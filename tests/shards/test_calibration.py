"""Calibrations: directions by falling variance, the same bytes for the same input, nothing damaged is believed."""

import numpy as np
import pytest
import safetensors.numpy

from shards.calibration import Calibration, calibrate, calibration_bytes, read_calibrations
from shards.schema import ShardError


def vectors(count: int = 500, channels: int = 12, seed: int = 0) -> np.ndarray:
    """Correlated channels of falling power about means that are not 0."""
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((count, channels)) * 0.7 ** np.arange(channels)
    return (mixed @ draw.standard_normal((channels, channels)) + draw.standard_normal(channels)).astype(np.float32)


def is_orthonormal(rotation: np.ndarray) -> bool:
    exact = rotation.astype(np.float64)
    return bool(np.allclose(exact @ exact.T, np.eye(len(exact)), atol=1e-5))


AWKWARD = {
    "fewer vectors than channels": vectors(5),
    "one vector": vectors(1),
    "zeros": np.zeros((50, 12), np.float32),
    "constant channels": np.concatenate([vectors(50, 6), np.full((50, 6), 7.5, np.float32)], axis=1),
    "huge": vectors() * np.float32(1e29),
    "tiny": vectors() * np.float32(1e-31),
    "one channel": vectors(50, 1),
}


def test_channels_are_uncorrelated_after_the_rotation_and_sorted_by_variance():
    x = vectors().astype(np.float64)
    calibration = calibrate(vectors())
    covariance = np.cov((x - calibration.mu) @ calibration.rotation.T.astype(np.float64), rowvar=False)
    variances = np.diag(covariance)
    assert (np.diff(variances) <= 0).all()
    assert np.abs(covariance - np.diag(variances)).max() < 1e-5 * variances[0]
    assert variances.sum() == pytest.approx(x.var(axis=0, ddof=1).sum(), rel=1e-5)
    np.testing.assert_allclose(calibration.mu, x.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("name", AWKWARD)
def test_any_input_gives_a_rotation(name):
    calibration = calibrate(AWKWARD[name])
    assert calibration.mu.dtype == calibration.rotation.dtype == np.float32
    assert np.isfinite(calibration.mu).all()
    assert is_orthonormal(calibration.rotation)


@pytest.mark.parametrize("name", AWKWARD)
def test_equal_input_gives_equal_bytes(name):
    first, second = (calibration_bytes({"tap": calibrate(AWKWARD[name].copy())}) for _ in range(2))
    assert first == second


def test_the_sign_of_a_direction_is_fixed():
    """The eigenvectors of a reflected input are the same, so a solver's choice of sign is not seen."""
    x = vectors()
    rotation = calibrate(x).rotation
    assert (np.take_along_axis(rotation, np.abs(rotation).argmax(axis=1)[:, None], axis=1) > 0).all()
    np.testing.assert_allclose(calibrate(-x).rotation, rotation, atol=1e-4)


def test_scale_changes_only_the_means():
    x = vectors()
    np.testing.assert_allclose(calibrate(x * np.float32(2**60)).rotation, calibrate(x).rotation, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 2, 2)])
def test_without_vectors_there_is_no_calibration(shape):
    with pytest.raises(ValueError, match="vectors have shape"):
        calibrate(np.zeros(shape, np.float32))


def stored() -> dict[str, Calibration]:
    return {"up_blocks.3": calibrate(vectors(channels=6)), "down_blocks.0": calibrate(vectors(channels=4))}


def test_calibrations_come_back_equal():
    read = read_calibrations(calibration_bytes(stored()))
    assert list(read) == ["down_blocks.0", "up_blocks.3"]
    for tap, calibration in stored().items():
        np.testing.assert_array_equal(read[tap].mu, calibration.mu)
        np.testing.assert_array_equal(read[tap].rotation, calibration.rotation)
    assert read_calibrations(calibration_bytes({})) == {}


def test_bytes_do_not_depend_on_the_order_of_the_taps():
    taps = stored()
    assert calibration_bytes(taps) == calibration_bytes(dict(reversed(taps.items())))


def test_a_cut_file_is_refused_wherever_it_ends():
    data = calibration_bytes(stored())
    for length in range(len(data)):
        with pytest.raises(ShardError):
            read_calibrations(data[:length])
    with pytest.raises(ShardError):
        read_calibrations(data + b"x")


def test_a_flipped_bit_is_refused_or_changes_little():
    """What the structure cannot show, the manifest's checksum does."""
    data = calibration_bytes(stored())
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x40
        try:
            read = read_calibrations(bytes(damaged))
        except ShardError:
            continue
        for calibration in read.values():
            assert np.isfinite(calibration.mu).all()
            assert np.abs(calibration.rotation).max() < 1.01


@pytest.mark.parametrize(
    "tensors",
    [
        {"tap.mu": np.zeros(3, np.float32)},
        {"tap.rotation": np.eye(3, dtype=np.float32)},
        {"mu": np.zeros(3, np.float32)},
        {"tap.mu": np.zeros(3, np.float32), "tap.rotation": np.eye(4, dtype=np.float32)},
        {"tap.mu": np.zeros((3, 1), np.float32), "tap.rotation": np.eye(3, dtype=np.float32)},
        {"tap.mu": np.zeros(3, np.float64), "tap.rotation": np.eye(3, dtype=np.float32)},
        {"tap.mu": np.zeros(3, np.float32), "tap.rotation": np.eye(3, dtype=np.float16)},
        {"tap.mu": np.zeros(0, np.float32), "tap.rotation": np.zeros((0, 0), np.float32)},
        {"tap.mu": np.full(3, np.nan, np.float32), "tap.rotation": np.eye(3, dtype=np.float32)},
        {"tap.mu": np.zeros(3, np.float32), "tap.rotation": 2 * np.eye(3, dtype=np.float32)},
        {"tap.mu": np.zeros(3, np.float32), "tap.rotation": np.full((3, 3), 3e38, np.float32)},
        {"tap.mu": np.zeros(3, np.float32), "tap.rotation": np.eye(3, dtype=np.float32), "more": np.zeros(1)},
    ],
)
def test_other_tensors_are_refused(tensors):
    with pytest.raises(ShardError):
        read_calibrations(safetensors.numpy.save(tensors))
