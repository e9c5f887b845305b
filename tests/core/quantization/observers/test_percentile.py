"""Percentiles against numpy.quantile."""

import numpy as np
import pytest
import torch

from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    PercentileCalibration,
    PercentileObserver,
    QuantizationSite,
)
from observer_reference import bin_width, fed, groups, lines, observer, scheme

PERCENTILES = [50.0, 90.0, 99.0, 99.99, 100.0]


def expected(values, percentile, symmetric):
    values = values.astype(np.float64)
    if symmetric:
        end = np.quantile(np.abs(values), percentile / 100)
        return -end, end
    cut = (1 - percentile / 100) / 2
    return np.quantile(values, cut), np.quantile(values, 1 - cut)


def normal(generator, shape):
    return generator.normal(size=shape)


def skewed(generator, shape):
    return np.square(np.maximum(generator.normal(size=shape), 0)) - 0.1


def outliers(generator, shape):
    return generator.standard_t(2, size=shape)


@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("draw", [normal, skewed, outliers])
def test_observed_is_within_half_a_bin(draw, axis, symmetric, percentile):
    generator = np.random.default_rng(1)
    parts = [(draw(generator, (40, 3)) * (1 + i)).astype(np.float32) for i in range(10)]
    calibration = PercentileCalibration(percentile)
    target = fed(observer(calibration, scheme(8, symmetric, axis), 3), parts)
    low, high = (end.reshape(-1).numpy() for end in target.observed_range())
    for index, line in enumerate(lines(np.concatenate(parts), axis)):
        tolerance = bin_width(line, 2048)[0] * (1 if symmetric else 0.5) * (1 + 1e-6)
        wanted = expected(line, percentile, symmetric)
        assert abs(low[index] - wanted[0]) <= tolerance
        assert abs(high[index] - wanted[1]) <= tolerance
        if percentile == 100.0:
            assert (low[index], high[index]) == (
                (-np.abs(line).max(), np.abs(line).max()) if symmetric else (line.min(), line.max())
            )


@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_weights_equal_numpy(granularity, symmetric, percentile):
    weight = np.random.default_rng(2).normal(size=(6, 5, 7)).astype(np.float32)
    options = {"group_size": 16} if granularity == "group" else {}
    of = scheme(
        8,
        symmetric,
        0 if granularity == "channel" else None,
        **options,
        **({} if granularity == "channel" else {"granularity": granularity}),
    )
    site = QuantizationSite("fc", "weight", 6, shape=weight.shape)
    low, high = (
        PercentileCalibration(percentile)
        .make_observer(of, site)
        .compute_range(torch.tensor(weight))
    )
    parts = {
        "tensor": [weight],
        "channel": list(weight),
        "group": groups(weight, 16),
    }[granularity]
    wanted = np.array([expected(part, percentile, symmetric) for part in parts]).T
    shape = {"tensor": (), "channel": (6,), "group": (6, 3)}[granularity]
    assert low.shape == high.shape == shape
    np.testing.assert_allclose(low.reshape(-1), wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(high.reshape(-1), wanted[1], rtol=1e-5, atol=1e-6)


def test_never_exceeds_the_extremes():
    """The centre of the outermost bin may lie beyond all of its values."""
    values = torch.full((1000,), 0.50001)
    target = observer(PercentileCalibration(50.0, bins=128), scheme(8))
    target.observe(values)
    assert target.observed_range()[1] == values[0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-38, -3.0, 0.50001])
def test_equal_values_have_no_reversed_range(value, symmetric):
    """The centre of a bin may lie beyond the farthest value as well."""
    target = observer(PercentileCalibration(99.0), scheme(8, symmetric))
    target.observe(torch.full((1000,), value))
    low, high = target.observed_range()
    wanted = torch.tensor(abs(value) if symmetric else value)
    assert (low, high) == (-wanted if symmetric else wanted, wanted)


def test_position_of_many_values_is_exact():
    # 3e7 zeros would shift a float32 position; the histogram of one batch is repeated instead.
    target = observer(PercentileCalibration(99.99), scheme(8, True))
    target.observe(torch.linspace(0, 1, 10_001))
    target.counts.mul_(10**6)
    _, high = target.observed_range()
    assert abs(high.item() - 0.9999) <= 2**-10


def test_one_value_and_no_value():
    target = observer(PercentileCalibration(99.0), scheme(8))
    assert [end.item() for end in target.observed_range()] == [0.0, 0.0]
    target.observe(torch.tensor([2.5]))
    assert [end.item() for end in target.observed_range()] == [2.5, 2.5]
    assert target.compute_range(torch.tensor([1.5]))[1] == 1.5


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.5, float("nan")])
def test_refused(percentile):
    with pytest.raises(QuantizationError, match="above 0 and at most 100"):
        PercentileObserver(scheme(), QuantizationSite("fc", "activation"), percentile)
