"""Options of post-training quantization: what each mode takes, needs and refuses."""

import pytest
import torch
from torch.utils.data import TensorDataset

from compression_manager.errors import ConfigError
from compression_manager.quantization import QuantizationScheme
from compression_plugins import LayerRule, PTQConfig

DATA = [torch.zeros(2, 6)]
STATIC = QuantizationScheme(bits=8, symmetric=False, signed=False)
DYNAMIC = QuantizationScheme(bits=8, symmetric=False, signed=False, dynamic=True)
TOKEN = QuantizationScheme(granularity="token", dynamic=True)


@pytest.mark.parametrize(
    ("options", "activation"),
    [
        ({"calibration_data": DATA}, STATIC),
        ({"mode": "dynamic"}, DYNAMIC),
        ({"mode": "weight_only"}, None),
        ({"mode": "dynamic", "activation": TOKEN}, TOKEN),
        (
            {"calibration_data": DATA, "activation": QuantizationScheme(bits=4)},
            QuantizationScheme(bits=4),
        ),
    ],
    ids=str,
)
def test_the_mode_chooses_the_scheme_of_inputs(options, activation):
    config = PTQConfig(**options)
    assert config.activation == activation
    assert config.weight == QuantizationScheme(granularity="channel", axis=0)


def test_the_mode_may_stand_first():
    assert PTQConfig("dynamic").mode == "dynamic"


def test_a_dynamic_exception_fits_into_static_mode():
    rule = LayerRule("head", activation=TOKEN)
    assert PTQConfig(calibration_data=DATA, overrides=[rule]).overrides == (rule,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "statics", "calibration_data": DATA}, "did you mean 'static'"),
        ({}, "calibration_data is missing, which mode='static' needs"),
        ({"mode": "dynamic", "bias_correction": True}, "which bias_correction=True needs"),
        ({"mode": "dynamic", "calibration_data": DATA}, "calibration_data has no use"),
        ({"mode": "weight_only", "calibration_batches": 3}, "calibration_batches has no use"),
        ({"mode": "dynamic", "calibration_forward": print}, "calibration_forward has no use"),
        ({"mode": "weight_only", "activation": STATIC}, "no use with mode='weight_only'"),
        ({"mode": "dynamic", "activation": STATIC}, "has a fixed range"),
        ({"calibration_data": DATA, "activation": DYNAMIC}, "choose mode='dynamic'"),
        (
            {"mode": "dynamic", "overrides": (LayerRule("fc", activation=STATIC),)},
            r"overrides\[0\].activation .* has a fixed range",
        ),
        (
            {"mode": "weight_only", "overrides": (LayerRule("fc", activation=TOKEN),)},
            r"overrides\[0\].activation has no use",
        ),
        ({"mode": "dynamic", "overrides": ("fc",)}, "overrides takes LayerRule objects"),
        ({"mode": "dynamic", "weight": 8}, "PTQConfig.weight must be of type"),
        ({"mode": "dynamic", "weight": DYNAMIC}, "PTQConfig.weight: dynamic=True is for inputs"),
        ({"calibration_data": torch.zeros(2, 6)}, "got a Tensor. Put a single batch into a list"),
        ({"calibration_data": {"input": DATA[0]}}, "got a dict"),
        ({"calibration_data": TensorDataset(DATA[0])}, "got a TensorDataset"),
        ({"calibration_data": 3}, "got a int"),
        ({"calibration_data": DATA, "calibration_batches": 0}, "at least 1"),
        ({"calibration_data": DATA, "calibration_forward": 1}, "must be a function"),
        ({"calibration_data": DATA, "bias_correction": 1}, "bias_correction must be of type bool"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PTQConfig(**options)
