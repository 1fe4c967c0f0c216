"""The rotated codec's promises: bounded and unbiased in the rotated space, the requested decibels, numpy as torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import device_codec, rotated_codec
from shards.calibration import Calibration, calibrate
from shards.codec import DITHER_TABLE_SIZE, MAX_SNR_DB

SHAPE = (16, 12, 12)


def feature(seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """(C, h, w): correlated channels of very different power, about means that are not 0."""
    draw = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((16, 16)) * 0.6 ** np.arange(16)
    values = (mix @ draw.standard_normal((16, 144))).reshape(SHAPE) + 3 * np.arange(16)[:, None, None]
    return (scale * values).astype(np.float32)


def calibration(scale: float = 1.0, entries: int = 8) -> Calibration:
    """That of other entries than those which the tests code."""
    others = [feature(1000 + i, scale).reshape(16, -1).T for i in range(entries)]
    return calibrate(np.concatenate(others))


def rounding(x: np.ndarray, known: Calibration) -> float:
    """What float32 arithmetic itself may add: some last places of the largest value, in each sum."""
    return 64 * float(np.abs(x).max() + np.abs(known.mu).max()) * 2.0**-24


def awkward() -> dict[str, tuple[np.ndarray, Calibration]]:
    """Entries, and calibrations that may fit badly."""
    outlier = feature()
    outlier[2, 5, 7] = 1e5
    return {
        "plain": (feature(), calibration()),
        "tiny": (feature(scale=1e-30), calibration(1e-30)),
        "huge": (feature(scale=1e30), calibration(1e30)),
        "outlier": (outlier, calibration()),
        "zeros": (np.zeros(SHAPE, np.float32), calibrate(np.zeros((9, 16), np.float32))),
        "the mean": (np.full(SHAPE, 2.5, np.float32), calibrate(np.full((9, 16), 2.5, np.float32))),
        "calibrated on one vector": (feature(), calibrate(feature(5).reshape(16, -1).T[:1])),
        "calibrated on another scale": (feature(), calibration(100.0)),
    }


@pytest.mark.parametrize("name", awkward())
@pytest.mark.parametrize("snr_db", [-5.0, 10.0, 40.0, MAX_SNR_DB])
def test_error_never_exceeds_half_a_step_in_the_rotated_space(name, snr_db):
    x, known = awkward()[name]
    q, step = rotated_codec.quantise(x, known, snr_db, 12345)
    y = rotated_codec.rotated(x, known)
    decoded = rotated_codec.dequantise_rotated(q, float(step), 12345)
    assert q.dtype == np.int32
    assert np.abs(decoded - y).max() <= step / 2 + rounding(x, known)


@settings(max_examples=30, deadline=None)
@given(
    exponent=st.floats(-25, 25),
    snr_db=st.floats(-10, 60),
    seed=st.integers(0, 1000),
    offset=st.integers(0, DITHER_TABLE_SIZE - 1),
)
def test_error_is_bounded_at_any_scale(exponent, snr_db, seed, offset):
    x, known = feature(seed, 10.0**exponent), calibration(10.0**exponent, entries=1)
    q, step = rotated_codec.quantise(x, known, snr_db, offset)
    decoded = rotated_codec.dequantise(q, known, float(step), offset)
    # A rotation keeps lengths: the error of all channels of a position together is bounded.
    errors = np.sqrt(np.square(((decoded - x) / step).astype(np.float64)).sum(axis=0))
    assert errors.max() <= math.sqrt(16) / 2 + 4 * rounding(x, known) / step


@pytest.mark.parametrize("name", ["plain", "tiny", "huge", "calibrated on one vector"])
@pytest.mark.parametrize("snr_db", [0.0, 10.0, 30.0])
def test_the_signal_to_noise_ratio_is_the_requested_one(name, snr_db):
    x, known = awkward()[name]
    scale = np.abs(x).max()
    q, step = rotated_codec.quantise(x, known, snr_db, 77)
    error = (rotated_codec.dequantise(q, known, float(step), 77) - x) / scale
    signal = (x - known.mu[:, None, None]) / scale
    assert 10 * math.log10(np.mean(signal**2) / np.mean(error**2)) == pytest.approx(snr_db, abs=0.3)


@pytest.mark.parametrize("snr_db", [0.0, 10.0])
def test_error_is_uncorrelated_with_the_signal_and_zero_mean_over_dither(snr_db):
    x, known = feature(), calibration()
    offsets = np.random.default_rng(1).integers(DITHER_TABLE_SIZE, size=200).tolist()
    step = float(rotated_codec.quantise(x, known, snr_db, 0)[1])
    coded = [(rotated_codec.quantise(x, known, snr_db, offset)[0], offset) for offset in offsets]
    errors = np.stack([rotated_codec.dequantise(q, known, step, offset) - x for q, offset in coded])
    # Uniform on a step: variance step^2 / 12, which a rotation keeps. Five or six standard deviations of each mean.
    sigma = step / math.sqrt(12)
    assert abs(errors.mean()) < 5 * sigma / math.sqrt(errors.size)
    assert np.abs(errors.mean(axis=0)).max() < 6 * sigma / math.sqrt(len(offsets))
    correlation = np.corrcoef(errors.reshape(-1), np.tile(x.reshape(-1), len(offsets)))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(errors.size)
    assert errors.var() == pytest.approx(sigma**2, rel=0.02)


def test_a_rotation_concentrates_the_power_so_most_values_are_zero():
    x, known = feature(), calibration()
    plain = Calibration(known.mu, np.eye(16, dtype=np.float32))
    zeros = [(rotated_codec.quantise(x, c, 10.0, 0)[0] == 0).mean() for c in (plain, known)]
    assert zeros[1] > zeros[0] + 0.1


@pytest.mark.parametrize("name", awkward())
@pytest.mark.parametrize("snr_db", [0.0, 20.0, MAX_SNR_DB])
def test_torch_equals_the_numpy_reference(name, snr_db):
    x, known = awkward()[name]
    mu, rotation = torch.from_numpy(known.mu), torch.from_numpy(known.rotation)
    offset = DITHER_TABLE_SIZE - 100  # The dither wraps round.
    q, step = device_codec.quantise_rotated(torch.from_numpy(x)[None], mu, rotation, snr_db, [offset])
    reference_q, reference_step = rotated_codec.quantise(x, known, snr_db, offset)
    assert step.item() == pytest.approx(float(reference_step), rel=1e-4, abs=0)
    largest = 2 * rounding(x, known) / max(float(reference_step), 1e-45)
    assert np.abs(q[0].numpy().astype(np.int64) - reference_q).max() <= math.ceil(min(largest, 1e9))
    decoded = device_codec.dequantise_rotated(q, mu, rotation, step, [offset])[0].numpy()
    reference = rotated_codec.dequantise(q[0].numpy(), known, step.item(), offset)
    np.testing.assert_allclose(decoded, reference, rtol=0, atol=rounding(x, known))


def test_torch_returns_the_narrowest_integers():
    x, known = feature(), calibration()
    mu, rotation = torch.from_numpy(known.mu), torch.from_numpy(known.rotation)
    for snr_db, dtype in ((10.0, torch.int8), (50.0, torch.int16)):
        assert device_codec.quantise_rotated(torch.from_numpy(x)[None], mu, rotation, snr_db, [0])[0].dtype == dtype


def test_torch_treats_each_entry_of_a_batch_alone():
    batch = np.stack([feature(0), feature(1, 1e6), np.zeros(SHAPE, np.float32), feature(2, 1e-6)])
    known, offsets = calibration(), [3, 99, 7, 2**20]
    mu, rotation = torch.from_numpy(known.mu), torch.from_numpy(known.rotation)
    q, step = device_codec.quantise_rotated(torch.from_numpy(batch), mu, rotation, 15.0, offsets)
    together = device_codec.dequantise_rotated(q, mu, rotation, step, offsets)
    for i, offset in enumerate(offsets):
        q, step = device_codec.quantise_rotated(torch.from_numpy(batch[i : i + 1]), mu, rotation, 15.0, [offset])
        alone = device_codec.dequantise_rotated(q, mu, rotation, step, [offset])[0]
        torch.testing.assert_close(alone, together[i], rtol=1e-4, atol=1e-4 * float(step))


def test_the_sign_of_the_dither_makes_quiet_values_0_or_1():
    x = (1e-2 * np.random.default_rng(0).standard_normal(SHAPE)).astype(np.float32)
    x[0] *= 100
    q, _ = rotated_codec.quantise(x, Calibration(np.zeros(16, np.float32), np.eye(16, dtype=np.float32)), 10.0, 5)
    assert set(np.unique(q[1:])) == {0, 1}


@pytest.mark.parametrize("value", [-128, 127])
def test_torch_takes_the_sign_out_of_integers_at_the_edge_of_a_byte(value):
    eye = Calibration(np.zeros(1, np.float32), np.eye(1, dtype=np.float32))
    for offset in range(20):
        x = np.full((1, 1, 1), value, np.float32)
        # So many decibels that step is 1: 12 * 10^(-snr_db / 10) * value^2 = 1.
        snr_db = 10 * math.log10(12 * value**2)
        q, step = device_codec.quantise_rotated(
            torch.from_numpy(x)[None], torch.from_numpy(eye.mu), torch.from_numpy(eye.rotation), snr_db, [offset]
        )
        decoded = rotated_codec.dequantise(q[0].numpy(), eye, step.item(), offset)
        assert np.abs(decoded - x).max() <= 0.5 + 1e-3
