"""Options of the calibration plugin: defaults, help, recipes and what is refused."""

import dataclasses

import pytest

import toys
from compression_manager import prepare_compression
from compression_manager.configuration.description import describe_config
from compression_manager.errors import ConfigError, QuantizationError
from compression_manager.quantization import (
    HistogramCalibration,
    HistogramObserver,
    MinMaxCalibration,
    MovingAverageCalibration,
    PercentileCalibration,
    PercentileObserver,
    QuantizationScheme,
)
from compression_plugins import QATConfig
from compression_plugins.calibration import CalibrationConfig


def test_defaults():
    config = CalibrationConfig()
    assert config.plugin == "calibration"
    assert config.observer == "moving_average"
    assert config.weight_observer == "min_max"
    assert config.averaging_constant == 0.01
    assert config.synchronize is True


def test_every_option_has_a_help_line():
    for field in dataclasses.fields(CalibrationConfig):
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"observer": "minmax"},
            r"observer 'minmax'.*did you mean 'min_max'\? Valid: fixed_range, histogram,",
        ),
        ({"weight_observer": "moving"}, r"weight_observer 'moving'.*'moving_average'"),
        ({"observer": None}, r"observer None does not exist; Valid: "),
        ({"observer": ["min_max"]}, r"observer \['min_max'\] does not exist"),
        ({"averaging_constant": 0.0}, r"above 0 and at most 1, got 0.0"),
        ({"averaging_constant": 1.5}, r"above 0 and at most 1, got 1.5"),
        ({"averaging_constant": float("nan")}, r"above 0 and at most 1, got nan"),
        ({"averaging_constant": "0.1"}, r"averaging_constant is a number, got '0.1'"),
        ({"averaging_constant": True}, r"averaging_constant is a number, got True"),
        ({"synchronize": "no"}, r"synchronize.*bool.*no"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationConfig(**options)


@pytest.mark.parametrize("option", ["observer", "weight_observer"])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("min_max", MinMaxCalibration()),
        ("moving_average", MovingAverageCalibration(0.25)),
        ("percentile", PercentileCalibration()),
        ("histogram", HistogramCalibration()),
        (MovingAverageCalibration(0.5), MovingAverageCalibration(0.5)),
        (PercentileCalibration(90.0), PercentileCalibration(90.0)),
    ],
)
def test_what_an_option_stands_for(option, given, meant):
    config = CalibrationConfig(**{option: given}, averaging_constant=0.25)
    assert config.calibration(option) == meant


RECIPE = """
plugins:
  qat: {}
  calibration:
    observer: {type: histogram, objective: kl_divergence}
    weight_observer: percentile
"""


def _recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def _observers(manager):
    layer = manager.model[0]
    return layer.input_quantizer.observer, layer.weight_quantizer.observer


def test_names_and_types_in_a_recipe(tmp_path):
    manager = prepare_compression(toys.mlp(), _recipe(tmp_path, RECIPE))
    activation, weight = _observers(manager)
    assert isinstance(activation, HistogramObserver)
    assert activation.objective == "kl_divergence"
    assert isinstance(weight, PercentileObserver)
    manager.close()


def test_a_described_recipe_gives_the_same_config(tmp_path):
    config = CalibrationConfig(PercentileCalibration(99.0), "histogram")
    described = describe_config(config)
    assert described["observer"] == {"type": "percentile", "percentile": 99.0, "bins": 2048}
    assert described["weight_observer"] == "histogram"
    recipe = f"plugins: {{qat: {{}}, calibration: {described!r}}}"
    recipe = recipe.replace("None", "null").replace("True", "true")
    manager = prepare_compression(toys.mlp(), _recipe(tmp_path, recipe))
    activation, weight = _observers(manager)
    assert isinstance(activation, PercentileObserver)
    assert activation.percentile == 99.0
    assert isinstance(weight, HistogramObserver)
    manager.close()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight_observer: percentile", "weight_observer: percentil", "did you mean 'percentile'"),
        ("histogram, obj", "histogramm, obj", r"calibration\.observer\.type: .*'histogram'"),
        ("objective:", "objektive:", r"calibration\.observer\.objektive: .*'objective'"),
        ("kl_divergence", "kl", r"calibration\.observer: .*'kl' does not exist"),
        ("weight_observer: percentile", "weight_observer: 3", r"weight_observer: expected"),
    ],
)
def test_mistakes_in_a_recipe_name_the_key_path(tmp_path, old, new, message):
    assert old in RECIPE
    with pytest.raises(ConfigError, match=message):
        prepare_compression(toys.mlp(), _recipe(tmp_path, RECIPE.replace(old, new)))


def test_an_observer_that_does_not_fit_names_its_option():
    scheme = QuantizationScheme(9, False)
    configs = [QATConfig(activation=scheme), CalibrationConfig(observer="histogram")]
    with pytest.raises(QuantizationError, match=r"too coarse for 9 bits") as caught:
        prepare_compression(toys.mlp(), configs)
    assert caught.value.option == "observer"
