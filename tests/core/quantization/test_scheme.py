"""The integer range of every scheme, its description, and what is refused."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression_manager.errors import QuantizationError
from compression_manager.quantization import QuantizationScheme, choose_qparams, fake_quantize
from compression_manager.quantization.scheme import storage_dtype

common = {
    "bits": st.integers(1, 32),
    "symmetric": st.booleans(),
    "signed": st.booleans(),
}
schemes = (
    st.builds(QuantizationScheme, **common, dynamic=st.booleans())
    | st.builds(
        QuantizationScheme,
        **common,
        granularity=st.just("channel"),
        axis=st.none() | st.integers(-4, 4),
    )
    | st.builds(
        QuantizationScheme,
        **common,
        granularity=st.just("group"),
        group_size=st.none() | st.integers(1, 256),
    )
    | st.builds(QuantizationScheme, **common, granularity=st.just("token"), dynamic=st.just(True))
    | st.builds(
        QuantizationScheme,
        **(common | {"bits": st.integers(2, 32)}),
        narrow_range=st.booleans(),
    )
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
        (1, True, True, (0, 1, torch.uint8)),
        (1, True, False, (0, 1, torch.uint8)),
        (1, False, True, (-1, 0, torch.int8)),
        (1, False, False, (0, 1, torch.uint8)),
    ],
)
def test_integer_range_and_storage(bits, symmetric, signed, expected):
    scheme = QuantizationScheme(bits, symmetric, signed=signed)
    assert (scheme.quant_min, scheme.quant_max, scheme.storage_dtype) == expected


@given(schemes)
def test_symmetric_ranges_reach_equally_far_from_the_zero_point(scheme):
    if scheme.bits == 1:
        assert scheme.quant_max - scheme.quant_min == 1
    elif scheme.symmetric and scheme.narrow_range is not False:
        middle = scheme.symmetric_zero_point
        assert middle - scheme.quant_min == scheme.quant_max - middle
        assert middle == (0 if scheme.signed else 2 ** (scheme.bits - 1))
    else:
        levels = 2**scheme.bits - bool(scheme.narrow_range)
        assert scheme.quant_max - scheme.quant_min + 1 == levels


@pytest.mark.parametrize(
    ("symmetric", "signed", "narrow", "expected"),
    [
        (True, True, False, (-128, 127)),
        (True, False, False, (0, 255)),
        (False, True, True, (-127, 127)),
        (False, False, True, (1, 255)),
    ],
)
def test_narrow_range_is_an_axis_of_its_own(symmetric, signed, narrow, expected):
    scheme = QuantizationScheme(8, symmetric, signed=signed, narrow_range=narrow)
    assert (scheme.quant_min, scheme.quant_max) == expected
    other = dataclasses.replace(QuantizationScheme(), symmetric=False)
    assert other.quant_min == -128


@pytest.mark.parametrize("signed", [True, False])
def test_one_symmetric_bit_is_zero_and_a_positive_number(signed):
    scheme = QuantizationScheme(1, signed=signed)
    scale, zero_point = choose_qparams(-0.5, 2.0, scheme)
    x = torch.tensor([-0.5, 0.0, 0.9, 1.1, 2.0])
    output = fake_quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max)
    assert output.tolist() == [0.0, 0.0, 0.0, 2.0, 2.0]


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
        (QuantizationScheme(4, granularity="group"), "int4 symmetric per group of 32"),
        (QuantizationScheme(granularity="token", dynamic=True), "int8 symmetric dynamic per token"),
        (QuantizationScheme(narrow_range=False), "int8 symmetric full-range per tensor"),
        (QuantizationScheme(4, False, narrow_range=True), "int4 affine narrow per tensor"),
    ],
)
def test_reads_as_words(scheme, text):
    assert str(scheme) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, r"1 to 32 bits, got bits=0"),
        ({"bits": 33}, r"1 to 32 bits, got bits=33"),
        ({"bits": 1, "narrow_range": True}, "single integer"),
        ({"narrow_range": 1}, r"narrow_range .* true or false, got 1"),
        ({"dynamic": 1}, r"dynamic .* true or false, got 1"),
        ({"symmetric": None}, r"symmetric .* true or false, got None"),
        ({"group_size": 4}, r"group_size=4 has no meaning with granularity 'tensor'"),
        ({"granularity": "group", "group_size": 0}, r"group_size .* at least 1, got 0"),
        ({"granularity": "group", "axis": 0}, r"axis=0 has no meaning with granularity 'group'"),
        ({"granularity": "token"}, r"'token' needs dynamic=True"),
        ({"bits": 8.0}, r"bits .* is an integer, got 8.0"),
        ({"bits": True}, r"bits .* is an integer, got True"),
        ({"symmetric": 1}, r"symmetric .* true or false, got 1"),
        ({"signed": "no"}, r"signed .* true or false, got 'no'"),
        ({"granularity": "chanel"}, r"'chanel'.*did you mean 'channel'\? Valid: channel, group,"),
        ({"granularity": None}, r"unknown granularity None.*Valid: channel, group, tensor, token"),
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
