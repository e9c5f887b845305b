"""A range that is known beforehand."""

import math
import re

import pytest
import torch

import toys
from compression_manager import ConfigError, prepare_compression
from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    FixedRangeCalibration,
    MinMaxCalibration,
    QuantizationScheme,
    QuantizationSite,
)
from compression_plugins import CalibrationConfig, QATConfig

SCHEME = QuantizationScheme(8, False, signed=False)
SITE = QuantizationSite("fc", "activation")


def test_nothing_that_is_seen_changes_it():
    observer = FixedRangeCalibration(-0.5, 2.0).make_observer(SCHEME, SITE)
    for input in (torch.randn(8) * 100, torch.full((3,), math.nan)):
        observer.observe(input)
        assert [end.item() for end in observer.observed_range()] == [-0.5, 2.0]
        assert [end.item() for end in observer.compute_range(input)] == [-0.5, 2.0]
    assert observer.has_observed()


def test_has_the_shape_of_the_scales():
    group = QuantizationScheme(4, granularity="group", group_size=4)
    site = QuantizationSite("fc", "weight", shape=(3, 10))
    minimum, maximum = FixedRangeCalibration().make_observer(group, site).observed_range()
    assert torch.equal(minimum, torch.full((3, 3), -1.0))
    assert torch.equal(maximum, torch.ones(3, 3))


def test_merges_with_the_same_range_only():
    make = FixedRangeCalibration(0.0, 1.0).make_observer
    make(SCHEME, SITE).merge(make(SCHEME, SITE))
    for other, reason in (
        (FixedRangeCalibration(), r"\[0.0, 1.0\] .* here, \[-1.0, 1.0\]"),
        (MinMaxCalibration(), "own kind only, got a MinMaxObserver"),
    ):
        with pytest.raises(QuantizationError, match=f"{re.escape(str(SITE))}: .*{reason}"):
            make(SCHEME, SITE).merge(other.make_observer(SCHEME, SITE))


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_ranges_without_meaning_are_refused(ends):
    with pytest.raises(ConfigError, match="minimum is below maximum"):
        FixedRangeCalibration(*ends)


def test_trains_and_converts_with_the_fixed_scale():
    model = toys.mlp()
    calibration = CalibrationConfig(observer=FixedRangeCalibration(-2.0, 3.1))
    manager = prepare_compression(model, [QATConfig(), calibration])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    toys.train(manager, toys.loader(toys.vectors()), optimizer, epochs=1)
    int8 = manager.convert()
    for layer in (int8[0], int8[2]):
        assert layer.input_scale.item() == pytest.approx(5.1 / 255)
        assert layer.input_zero_point.item() == 100
