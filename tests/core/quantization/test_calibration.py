"""Calibrations: their options, their checks, and the observers that they make."""

import dataclasses

import pytest

from compression_manager.errors import ConfigError
from compression_manager.quantization import (
    Calibration,
    FixedRangeObserver,
    HistogramCalibration,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageCalibration,
    MovingAverageObserver,
    PercentileCalibration,
    PercentileObserver,
    QuantizationScheme,
    QuantizationSite,
)
from compression_manager.quantization.calibration import CALIBRATIONS

SCHEME = QuantizationScheme(8, False)
SITE = QuantizationSite("fc", "activation")


def test_defaults():
    assert MovingAverageCalibration().averaging_constant == 0.01
    assert PercentileCalibration() == PercentileCalibration(percentile=99.99, bins=2048)
    assert HistogramCalibration() == HistogramCalibration(objective="squared_error", bins=2048)


@pytest.mark.parametrize(
    ("name", "observer_class"),
    [
        ("min_max", MinMaxObserver),
        ("moving_average", MovingAverageObserver),
        ("percentile", PercentileObserver),
        ("histogram", HistogramObserver),
        ("fixed_range", FixedRangeObserver),
    ],
)
def test_every_name_makes_its_observer(name, observer_class):
    calibration = CALIBRATIONS[name]()
    assert isinstance(calibration, Calibration)
    first, second = (calibration.make_observer(SCHEME, SITE) for _ in range(2))
    assert type(first) is type(second) is observer_class
    assert first is not second


def test_options_reach_the_observer():
    averaging = MovingAverageCalibration(0.5).make_observer(SCHEME, SITE)
    assert averaging.averaging_constant == 0.5
    percentile = PercentileCalibration(95.0, bins=300).make_observer(SCHEME, SITE)
    assert (percentile.percentile, percentile.bins) == (95.0, 300)
    histogram = HistogramCalibration("kl_divergence", bins=4096).make_observer(SCHEME, SITE)
    assert (histogram.objective, histogram.bins) == ("kl_divergence", 4096)


@pytest.mark.parametrize("name", list(CALIBRATIONS))
def test_every_option_has_a_help_line_and_none_can_change(name):
    calibration = CALIBRATIONS[name]()
    for field in dataclasses.fields(calibration):
        assert field.metadata["help"].endswith("."), field.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(calibration, field.name, 1)


@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        (MovingAverageCalibration, {"averaging_constant": 0.0}, "above 0 and at most 1, got 0.0"),
        (MovingAverageCalibration, {"averaging_constant": "1"}, "is a number, got '1'"),
        (PercentileCalibration, {"percentile": 0}, "above 0 and at most 100, got 0"),
        (PercentileCalibration, {"percentile": 101.0}, "above 0 and at most 100, got 101"),
        (PercentileCalibration, {"percentile": float("nan")}, "at most 100, got nan"),
        (PercentileCalibration, {"percentile": True}, "percentile is a number, got True"),
        (PercentileCalibration, {"bins": 127}, "bins is an integer of at least 128, got 127"),
        (HistogramCalibration, {"bins": 2048.0}, "bins is an integer of at least 128, got 2048.0"),
        (
            HistogramCalibration,
            {"objective": "kl_divergense"},
            r"objective 'kl_divergense' does not exist; did you mean 'kl_divergence'\?",
        ),
        (HistogramCalibration, {"objective": None}, "objective None does not exist"),
    ],
)
def test_refused(calibration, options, message):
    with pytest.raises(ConfigError, match=f"{calibration.__name__}: .*{message}"):
        calibration(**options)
