"""Deployed layers by themselves."""

import json

import pytest
import torch
from torch import nn

from compression_manager.deploy import LayerSpec
from compression_manager.deploy.layers.kinds import CONVERTED_CLASSES
from compression_manager.errors import QuantizationError
from compression_manager.quantization import QuantizationScheme

WEIGHT = QuantizationScheme(granularity="channel")
INPUT = QuantizationScheme(symmetric=False, signed=False)


@pytest.mark.parametrize("input", [INPUT, None])
def test_a_spec_survives_json(input):
    spec = LayerSpec("Conv2d", WEIGHT, input, True)
    assert LayerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("layer", "spec", "expected"),
    [
        (
            nn.Linear(3, 2),
            LayerSpec("Linear", WEIGHT, INPUT, True),
            {
                "weight": (torch.int8, (2, 3)),
                "weight_scale": (torch.float32, (2,)),
                "input_scale": (torch.float32, ()),
                "input_zero_point": (torch.int32, ()),
                "bias": (torch.float32, (2,)),
            },
        ),
        (
            nn.Linear(3, 2),
            LayerSpec("Linear", QuantizationScheme(3, False, "channel"), None, False),
            {
                "weight": (torch.uint8, (3,)),
                "weight_scale": (torch.float32, (2,)),
                "weight_zero_point": (torch.int8, (2,)),
            },
        ),
        (
            nn.Embedding(5, 2).double(),
            LayerSpec("Embedding", QuantizationScheme(bits=32), None, False),
            {
                "weight": (torch.int32, (5, 2)),
                "weight_scale": (torch.float32, ()),
            },
        ),
        (
            nn.Conv1d(2, 4, 3, bias=False, dtype=torch.bfloat16),
            LayerSpec("Conv1d", QuantizationScheme(signed=False, symmetric=False), INPUT, True),
            {
                "weight": (torch.uint8, (4, 2, 3)),
                "weight_scale": (torch.float32, ()),
                "weight_zero_point": (torch.uint8, ()),
                "input_scale": (torch.float32, ()),
                "input_zero_point": (torch.int32, ()),
                "bias": (torch.bfloat16, (4,)),
            },
        ),
        (
            nn.LSTM(6, 5, proj_size=3),
            LayerSpec("LSTM", WEIGHT, None, True),
            {
                "ih_l0.weight": (torch.int8, (20, 6)),
                "ih_l0.weight_scale": (torch.float32, (20,)),
                "ih_l0.bias": (torch.float32, (20,)),
                "hh_l0.weight": (torch.int8, (20, 3)),
                "hh_l0.weight_scale": (torch.float32, (20,)),
                "hh_l0.bias": (torch.float32, (20,)),
                "hr_l0.weight": (torch.int8, (3, 5)),
                "hr_l0.weight_scale": (torch.float32, (3,)),
            },
        ),
    ],
)
def test_a_layer_holds_what_its_spec_says(layer, spec, expected):
    converted = CONVERTED_CLASSES[spec.kind](layer, spec)
    held = {name: (value.dtype, tuple(value.shape)) for name, value in converted.named_buffers()}
    assert held == expected == {
        name: (value.dtype, tuple(value.shape)) for name, value in converted.state_dict().items()
    }  # fmt: skip
    assert not list(converted.parameters())
    assert not converted.training
    for constant in type(layer).__constants__:
        assert getattr(converted, constant) == getattr(layer, constant)


def test_a_part_says_its_sizes_as_a_linear_layer_does():
    converted = CONVERTED_CLASSES["LSTM"](nn.LSTM(6, 5), LayerSpec("LSTM", WEIGHT, None, True))
    assert (converted.ih_l0.in_features, converted.ih_l0.out_features) == (6, 20)


def test_printing_shows_the_schemes():
    layer = CONVERTED_CLASSES["Linear"](nn.Linear(3, 2), LayerSpec("Linear", WEIGHT, None, True))
    assert repr(layer) == f"ConvertedLinear(weight={WEIGHT}, input=float)"


def test_weights_are_shared_only_if_equal():
    spec = LayerSpec("Linear", WEIGHT, None, False)
    first, second = (CONVERTED_CLASSES["Linear"](nn.Linear(3, 2), spec) for _ in range(2))
    second.weight_scale.fill_(2.0)
    second.share_weight(first)
    assert second.integer_weight() is not first.integer_weight()
    second.weight_scale.fill_(1.0)
    second.share_weight(first)
    assert second.integer_weight() is first.integer_weight()
    assert second.weight_scale is first.weight_scale


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 2), (4, 3)),
        (nn.Conv1d(3, 2, 1), (4, 3, 5)),
        (nn.ConvTranspose1d(3, 2, 1), (4, 3, 5)),
    ],
    ids=lambda item: type(item).__name__,
)
def test_an_input_of_integers_is_refused(layer, shape):
    kind = type(layer).__name__
    converted = CONVERTED_CLASSES[kind](layer, LayerSpec(kind, WEIGHT, None, True))
    with pytest.raises(QuantizationError, match=rf"{kind} got an input of torch\.int8"):
        converted(torch.ones(shape).to(torch.int8))
