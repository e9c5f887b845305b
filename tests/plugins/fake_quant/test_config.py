"""Options of the quantization-aware training plugin."""

import pytest
from torch import nn

import compression_plugins
from compression_manager.errors import ConfigError
from compression_manager.quantization import QuantizationScheme
from compression_manager.training.schedule import StartAt
from compression_plugins.fake_quant import LayerRule, QATConfig


def test_the_default_is_int8_per_channel_and_uint8_affine_per_tensor():
    config = QATConfig()
    assert (config.weight.bits, config.weight.symmetric, config.weight.axis) == (8, True, 0)
    assert (config.weight.quant_min, config.weight.quant_max) == (-127, 127)
    assert config.activation.granularity == "tensor"
    assert not config.activation.symmetric
    assert (config.activation.quant_min, config.activation.quant_max) == (0, 255)
    assert (config.observe_at, config.fake_quantize_at) == (StartAt(step=0), StartAt(step=1))
    assert compression_plugins.QATConfig is QATConfig
    assert compression_plugins.QuantizationAwareTrainingConfig is QATConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either layer or module_class"),
        ({"layer": "a", "module_class": "Linear"}, "either layer or module_class"),
        ({"module_class": nn.Linear}, "takes a name, .* write module_class='Linear'"),
        ({"layer": 3}, "LayerRule.layer takes a name, got 3; write layer='3'"),
        ({"layer": "a", "skip": True, "weight_only": True}, "skip=True leaves nothing"),
        ({"layer": "a", "skip": True, "weight": QuantizationScheme()}, "skip=True leaves nothing"),
        ({"layer": "a", "weight_only": True, "activation": QuantizationScheme()}, "contradicts"),
        ({"layer": "a", "weight": "int8"}, "LayerRule.weight must be of type QuantizationScheme"),
        ({"layer": "a", "activation": 8}, "LayerRule.activation takes a QuantizationScheme"),
        (
            {"layer": "a", "activation": QuantizationScheme(granularity="channel")},
            "one range per 'tensor'",
        ),
    ],
)
def test_a_rule_without_meaning_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LayerRule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": "int8"}, "QATConfig.weight must be of type QuantizationScheme"),
        ({"activation": 8}, "QATConfig.activation takes a QuantizationScheme"),
        ({"activation": QuantizationScheme(granularity="channel")}, "one range per 'tensor'"),
        ({"weight": QuantizationScheme(dynamic=True)}, "dynamic=True is for inputs"),
        ({"overrides": LayerRule("a")}, "QATConfig.overrides must be of type tuple or list"),
        ({"overrides": ["a"]}, "takes LayerRule objects, got 'a'"),
        ({"observe_at": 3}, "QATConfig.observe_at must be of type StartAt, got 3"),
        ({"fake_quantize_at": None}, "QATConfig.fake_quantize_at must be of type StartAt"),
        ({"freeze_batch_norm_at": 2}, "QATConfig.freeze_batch_norm_at must be of type StartAt"),
        (
            {"observe_at": StartAt(step=4), "freeze_observers_at": StartAt(step=4)},
            "must come after observe_at",
        ),
        (
            {"observe_at": StartAt(epoch=2), "freeze_observers_at": StartAt(epoch=1)},
            "must come after observe_at",
        ),
    ],
)
def test_an_invalid_option_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        QATConfig(**arguments)
