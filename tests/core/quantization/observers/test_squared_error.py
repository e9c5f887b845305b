"""The least squared error against an exhaustive search in float64."""

import numpy as np
import pytest
import torch

from compression_manager.errors import QuantizationError
from compression_manager.quantization import HistogramCalibration, QuantizationSite
from observer_reference import (
    centres,
    fed,
    groups,
    histogram,
    least_squared_error,
    lines,
    observer,
    scheme,
    squared_error,
)

# The search ends at a step of a thirty-second of an octave around the least candidate.
TOLERANCE = 1.02


def normal(generator, shape):
    return generator.normal(size=shape)


def rectified(generator, shape):
    return np.maximum(generator.normal(size=shape), 0)


def lopsided(generator, shape):
    x = generator.normal(size=shape) * 2
    return x / (1 + np.exp(-1.7 * x))


def outliers(generator, shape):
    x = generator.normal(size=shape)
    x.reshape(-1)[:3] = [40.0, -9.0, 25.0]
    return x


def one_outlier(generator, shape):
    x = generator.normal(size=shape)
    x.reshape(-1)[0] = 200.0
    return x


DRAWS = [normal, rectified, lopsided, outliers, one_outlier]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("draw", DRAWS)
def test_observed(draw, symmetric, bits):
    generator = np.random.default_rng(3)
    parts = [draw(generator, (1500,)).astype(np.float32) for _ in range(4)]
    of = scheme(bits, symmetric, signed=symmetric)
    target = fed(observer(HistogramCalibration(), of), parts)
    low, high = (end.item() for end in target.observed_range())
    everything = np.concatenate(parts)
    assert everything.min() <= low <= 0 <= high <= everything.max()
    points, counts = centres(everything, 2048), histogram(everything, 2048)
    filled = counts > 0
    points, counts = points[filled], counts[filled]
    found = squared_error(points, counts, low, high, of)
    least = least_squared_error(points, counts, of, steps=33)
    assert found <= TOLERANCE * least


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_weights(granularity, symmetric, bits):
    generator = np.random.default_rng(4)
    weight = np.stack([draw(generator, (3, 37)) for draw in DRAWS]).astype(np.float32)
    if granularity == "channel":
        of, parts = scheme(bits, symmetric, 0), list(weight)
    else:
        of = scheme(bits, symmetric, granularity="group", group_size=40)
        parts = groups(weight, 40)
    site = QuantizationSite("fc", "weight", 5, shape=weight.shape)
    weight_observer = HistogramCalibration().make_observer(of, site)
    low, high = weight_observer.compute_range(torch.tensor(weight))
    assert low.shape == ((5,) if granularity == "channel" else (5, 3))
    for part, a, b in zip(parts, low.reshape(-1).tolist(), high.reshape(-1).tolist(), strict=True):
        points = part.reshape(-1).astype(np.float64)
        found = squared_error(points, 1.0, a, b, of)
        whole = squared_error(points, 1.0, points.min(), points.max(), of)
        assert found <= whole * (1 + 1e-5)
        # With so few values, the error has several valleys.
        assert found <= 1.05 * least_squared_error(points, 1.0, of, steps=33)


def test_per_channel_equals_each_channel_alone():
    x = np.random.default_rng(5).standard_t(3, size=(200, 4)).astype(np.float32)
    for symmetric in (True, False):
        together = fed(observer(HistogramCalibration(), scheme(4, symmetric, 1), 4), [x])
        for channel, line in enumerate(lines(x, 1)):
            alone = fed(observer(HistogramCalibration(), scheme(4, symmetric)), [line])
            for end, single in zip(together.observed_range(), alone.observed_range(), strict=True):
                assert end[channel] == single


def test_clips_more_with_fewer_bits():
    x = np.random.default_rng(6).normal(size=20_000).astype(np.float32)
    ends = [
        max(
            end.abs().item()
            for end in fed(
                observer(HistogramCalibration(), scheme(bits, True)), [x]
            ).observed_range()
        )
        for bits in (2, 4, 6, 8)
    ]
    assert ends == sorted(ends)
    # The same optimum for the density itself, which a sample of this size scatters around.
    points = np.linspace(-6, 6, 20_001)
    density = np.exp(-np.square(points) / 2)
    clips = np.linspace(1, 4, 301)
    errors = [squared_error(points, density, -clip, clip, scheme(4, True)) for clip in clips]
    assert ends[1] == pytest.approx(clips[np.argmin(errors)], rel=0.03)


def test_extreme_magnitudes():
    for factor in (1e-30, 1e30):
        x = (np.random.default_rng(7).normal(size=500) * factor).astype(np.float32)
        for symmetric in (True, False):
            target = fed(observer(HistogramCalibration(), scheme(4, symmetric)), [x])
            low, high = target.observed_range()
            assert torch.isfinite(low)
            assert torch.isfinite(high)
            assert low < 0 < high


def test_equal_values_keep_their_range():
    for value in (0.0, 3.0, -3.0):
        target = fed(observer(HistogramCalibration(), scheme(8)), [np.full(9, value, np.float32)])
        low, high = (end.item() for end in target.observed_range())
        assert low == min(value, 0.0)
        assert high == pytest.approx(max(value, 0.0), rel=0.01)


def test_many_bits_keep_the_whole_range_of_a_weight():
    weight = torch.randn(4, 50)
    site = QuantizationSite("fc", "weight", 4)
    low, high = (
        HistogramCalibration().make_observer(scheme(32, True, 0), site).compute_range(weight)
    )
    assert torch.equal(low, weight.amin(1))
    assert torch.equal(high, weight.amax(1))


def test_too_coarse_a_histogram_is_refused():
    activation, weight = (QuantizationSite("fc", role) for role in ("activation", "weight"))
    with pytest.raises(QuantizationError, match=r"2048 bins is too coarse for 9 bits.*bins=4096"):
        HistogramCalibration().make_observer(scheme(9), activation)
    HistogramCalibration(bins=4096).make_observer(scheme(9), activation)
    HistogramCalibration().make_observer(scheme(16), weight)
