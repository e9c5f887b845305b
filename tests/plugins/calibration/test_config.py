"""Options of the calibration plugin: defaults, help and what is refused."""

import dataclasses

import pytest

from compression_manager.errors import ConfigError
from compression_plugins.calibration import CalibrationConfig


def test_defaults():
    config = CalibrationConfig()
    assert config.plugin == "calibration"
    assert config.observer == "moving_average"
    assert config.weight_observer == "min_max"
    assert config.averaging_constant == 0.01


def test_every_option_has_a_help_line():
    for field in dataclasses.fields(CalibrationConfig):
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"observer": "minmax"},
            r"observer 'minmax'.*did you mean 'min_max'\? Valid: min_max",
        ),
        ({"weight_observer": "moving"}, r"weight_observer 'moving'.*'moving_average'"),
        ({"observer": None}, r"observer None does not exist; Valid: "),
        ({"observer": ["min_max"]}, r"observer \['min_max'\] does not exist"),
        ({"averaging_constant": 0.0}, r"above 0 and at most 1, got 0.0"),
        ({"averaging_constant": 1.5}, r"above 0 and at most 1, got 1.5"),
        ({"averaging_constant": float("nan")}, r"above 0 and at most 1, got nan"),
        ({"averaging_constant": "0.1"}, r"averaging_constant is a number, got '0.1'"),
        ({"averaging_constant": True}, r"averaging_constant is a number, got True"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationConfig(**options)
