"""The integer range of every scheme, its description, and what is refused."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression_manager.errors import QuantizationError
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.scheme import storage_dtype

schemes = st.builds(
    QuantizationScheme,
    bits=st.integers(2, 32),
    symmetric=st.booleans(),
    signed=st.booleans(),
) | st.builds(
    QuantizationScheme,
    bits=st.integers(2, 32),
    symmetric=st.booleans(),
    granularity=st.just("channel"),
    axis=st.none() | st.integers(-4, 4),
    signed=st.booleans(),
)


@pytest.mark.parametrize(
    ("bits", "symmetric", "signed", "expected"),
    [
        (8, True, True, (-127, 127, torch.int8)),
        (8, False, True, (-128, 127, torch.int8)),
        (8, False, False, (0, 255, torch.uint8)),
        (8, True, False, (1, 255, torch.uint8)),
        (4, True, True, (-7, 7, torch.int8)),
        (4, False, False, (0, 15, torch.uint8)),
        (2, True, True, (-1, 1, torch.int8)),
        (2, False, True, (-2, 1, torch.int8)),
        (9, False, False, (0, 511, torch.int16)),
        (16, False, True, (-32768, 32767, torch.int16)),
        (16, False, False, (0, 65535, torch.int32)),
        (24, True, True, (-8388607, 8388607, torch.int32)),
        (32, False, True, (-2147483648, 2147483647, torch.int32)),
        (32, False, False, (0, 4294967295, torch.int64)),
    ],
)
def test_integer_range_and_storage(bits, symmetric, signed, expected):
    scheme = QuantizationScheme(bits, symmetric, signed=signed)
    assert (scheme.quant_min, scheme.quant_max, scheme.storage_dtype) == expected


@given(schemes)
def test_symmetric_ranges_reach_equally_far_from_the_zero_point(scheme):
    if scheme.symmetric:
        middle = scheme.symmetric_zero_point
        assert middle - scheme.quant_min == scheme.quant_max - middle
        assert middle == (0 if scheme.signed else 2 ** (scheme.bits - 1))
    else:
        assert scheme.quant_max - scheme.quant_min + 1 == 2**scheme.bits


@given(schemes)
def test_description_survives_json(scheme):
    assert QuantizationScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_defaults_and_channel_axis():
    assert QuantizationScheme() == QuantizationScheme(8, True, "tensor", None, signed=True)
    assert QuantizationScheme(granularity="channel").axis == 0
    assert QuantizationScheme(granularity="channel", axis=1).axis == 1
    assert QuantizationScheme.from_dict({"bits": 4}) == QuantizationScheme(bits=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationScheme().bits = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (QuantizationScheme(granularity="channel"), "int8 symmetric per channel (axis 0)"),
        (QuantizationScheme(8, False, signed=False), "uint8 affine per tensor"),
        (QuantizationScheme(4, False, "channel", 1), "int4 affine per channel (axis 1)"),
    ],
)
def test_reads_as_words(scheme, text):
    assert str(scheme) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, r"2 to 32 bits, got bits=1"),
        ({"bits": 33}, r"2 to 32 bits, got bits=33"),
        ({"bits": 8.0}, r"bits .* is an integer, got 8.0"),
        ({"bits": True}, r"bits .* is an integer, got True"),
        ({"symmetric": 1}, r"symmetric .* true or false, got 1"),
        ({"signed": "no"}, r"signed .* true or false, got 'no'"),
        ({"granularity": "chanel"}, r"'chanel'.*did you mean 'channel'\? Valid: channel, tensor"),
        ({"granularity": None}, r"unknown granularity None.*Valid: channel, tensor"),
        ({"axis": 0}, r"axis=0 has no meaning with granularity 'tensor'"),
        ({"granularity": "channel", "axis": "0"}, r"axis .* is an integer, got '0'"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(QuantizationError, match=message):
        QuantizationScheme(**arguments)


def test_unknown_field_is_refused_with_the_nearest_name():
    with pytest.raises(QuantizationError, match=r"'simmetric'.*did you mean 'symmetric'"):
        QuantizationScheme.from_dict({"bits": 8, "simmetric": True})


def test_range_that_no_integer_type_holds():
    with pytest.raises(QuantizationError, match="no integer type"):
        storage_dtype(-1, 2**63)
