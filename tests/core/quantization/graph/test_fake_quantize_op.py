"""The line of a fake quantization: its text, its scale from a range, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compression_manager import QuantizationError
from compression_manager.quantization import FakeQuantizeOp, QuantizationGraph, QuantizationScheme


def test_line() -> None:
    op = FakeQuantizeOp(0, 1, [2, 3], scale=0.0157)
    assert str(op) == (
        "t1 = FakeQuantize(t0, bits=8, scale=0.0157, zero_point=0, symmetric=True) : Float32 [2, 3]"
    )


def test_line_of_positional_arguments() -> None:
    op = FakeQuantizeOp(4, 7, (1, 5), 4, 0.5, -3, False)
    assert str(op) == (
        "t7 = FakeQuantize(t4, bits=4, scale=0.5, zero_point=-3, symmetric=False) : Float32 [1, 5]"
    )
    assert (op.kind, op.input_ids, op.output_id) == ("FakeQuantize", (4,), 7)


@pytest.mark.parametrize(
    ("shape", "shown"),
    [((None, 3), "[?, 3]"), ((-1, 3), "[?, 3]"), ((), "[]"), (None, "?")],
)
def test_unknown_shape_and_scale(shape: Any, shown: str) -> None:
    line = str(FakeQuantizeOp(0, 1, shape))
    assert line == (
        f"t1 = FakeQuantize(t0, bits=8, scale=auto, zero_point=0, symmetric=True) : Float32 {shown}"
    )


@pytest.mark.parametrize(
    ("scale", "shown"),
    [
        (2 / 127, "0.0157"),
        (1.0, "1.0"),
        (0.12345, "0.1235"),
        (12.0, "12.0"),
        (0.0078125, "0.00781"),
        (1.234e-6, "1.23e-06"),
        (np.float32(0.25), "0.25"),
        (torch.tensor(0.25), "0.25"),
        ([0.5, 0.125, 0.25], "0.125..0.5"),
        (torch.tensor([[0.5], [0.25]]), "0.25..0.5"),
        ([0.5, 0.5], "0.5"),
    ],
)
def test_scale_is_short(scale: Any, shown: str) -> None:
    assert f"scale={shown}, zero_point=0," in str(FakeQuantizeOp(0, 1, (2,), scale=scale))


def test_several_zero_points_are_shown_as_a_range() -> None:
    op = FakeQuantizeOp(
        0, 1, (3,), 8, [0.5, 0.5, 1.0], [-3, 0, 4], False, granularity="channel", axis=0
    )
    assert "scale=0.5..1.0, zero_point=-3..4, symmetric=False, axis=0)" in str(op)


def test_what_differs_from_the_defaults_is_shown() -> None:
    tokens = FakeQuantizeOp(0, 1, (2, 3), granularity="token", dynamic=True, signed=False)
    assert "symmetric=True, granularity=token, dynamic=True, signed=False)" in str(tokens)
    groups = FakeQuantizeOp(0, 1, (2, 64), granularity="group", group_size=32)
    assert "symmetric=True, group_size=32)" in str(groups)


# Scale and zero point from a range ---------------------------------------------------------------


def test_symmetric_scale_of_a_range() -> None:
    op = FakeQuantizeOp(0, 1, (2, 3)).with_range(-1.0, 2.0)
    assert op.scale == pytest.approx(2 / 127, rel=1e-6)
    assert op.zero_point == 0
    assert "scale=0.0157, zero_point=0" in str(op)


def test_affine_scale_of_a_range() -> None:
    op = FakeQuantizeOp(0, 1, (2, 3), symmetric=False).with_range(-1.0, 3.0)
    assert op.scale == pytest.approx(4 / 255, rel=1e-6)
    assert op.zero_point == -128 + round(1 / (4 / 255))
    op.validate()


def test_scale_of_a_tensor() -> None:
    values = torch.tensor([[1.0, -4.0], [0.5, 0.25]])
    op = FakeQuantizeOp(0, 1, (2, 2), 4).with_range_of(values)
    assert op.scale == pytest.approx(4 / 7)
    rows = FakeQuantizeOp(0, 1, (2, 2), 4, granularity="channel", axis=0).with_range_of(values)
    np.testing.assert_allclose(np.asarray(rows.scale), [4 / 7, 0.5 / 7], rtol=1e-6)
    rows.validate()


def test_a_scale_that_is_there_is_kept() -> None:
    op = FakeQuantizeOp(0, 1, (2,), scale=0.5)
    assert op.with_range(-1.0, 1.0).scale == 0.5
    assert op.with_range_of(torch.ones(2)).scale == 0.5


def test_the_operation_itself_stays_without_scale() -> None:
    op = FakeQuantizeOp(0, 1, (2,))
    op.with_range(-1.0, 1.0)
    assert op.scale is None


@pytest.mark.parametrize(
    "attempt",
    [
        lambda op: op.with_range(float("nan"), 1.0),
        lambda op: op.with_range(2.0, 1.0),
        lambda op: op.with_range_of(torch.tensor([float("inf")])),
        lambda op: op.with_range_of(torch.zeros(())),
    ],
)
def test_bad_range_names_the_line(attempt: Any) -> None:
    op = FakeQuantizeOp(0, 1, (1,), granularity="channel", axis=0)
    with pytest.raises(QuantizationError, match=r"t1 = FakeQuantize\(t0"):
        attempt(op)


def test_scheme_and_back() -> None:
    scheme = QuantizationScheme(4, False, "channel", 1, signed=False)
    op = FakeQuantizeOp.of_scheme(0, 1, (2, 3), scheme)
    assert op.scheme == scheme
    unsigned = QuantizationScheme(signed=False)
    assert FakeQuantizeOp.of_scheme(0, 1, (2, 3), unsigned).zero_point == 128


# Validation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_valid_bits(bits: int) -> None:
    FakeQuantizeOp(0, 1, (2, 3), bits, 0.5).validate()


@pytest.mark.parametrize("zero_point", [-128, 127, [-128, 0, 127]])
def test_valid_zero_points(zero_point: Any) -> None:
    FakeQuantizeOp(0, 1, (3,), 8, 0.5, zero_point, False).validate()


def test_unsigned_zero_point() -> None:
    FakeQuantizeOp(0, 1, (3,), 8, 0.5, 255, False, signed=False).validate()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_bits": 0}, "1 to 32"),
        ({"num_bits": 33}, "1 to 32"),
        ({"num_bits": 8.0}, "integer"),
        ({"num_bits": True}, "integer"),
        ({"scale": 0.0}, "finite and positive"),
        ({"scale": -0.1}, "finite and positive"),
        ({"scale": float("inf")}, "finite and positive"),
        ({"scale": float("nan")}, "finite and positive"),
        ({"scale": [0.1, -0.1]}, "finite and positive"),
        ({"scale": torch.tensor([0.1, float("nan")])}, "finite and positive"),
        ({"zero_point": 128, "symmetric": False}, "-128 to 127"),
        ({"zero_point": -129, "symmetric": False}, "-128 to 127"),
        ({"zero_point": [0, 200], "symmetric": False}, "-128 to 127"),
        ({"zero_point": -1, "symmetric": False, "signed": False}, "0 to 255"),
        ({"zero_point": 0.5}, "not an integer"),
        ({"zero_point": float("nan")}, "not an integer"),
        ({"granularity": "row"}, "granularity"),
        ({"input_id": -1}, "id -1"),
        ({"output_id": "t1"}, "id 't1'"),
        ({"shape": (2, -3)}, "negative"),
        ({"shape": (2, 3.0)}, "integer"),
    ],
)
def test_refused(options: dict[str, Any], reason: str) -> None:
    op = FakeQuantizeOp(**{"input_id": 0, "output_id": 1, "shape": (2, 3), **options})
    with pytest.raises(QuantizationError) as caught:
        op.validate()
    assert str(op) in str(caught.value)
    assert reason in str(caught.value)


def test_what_is_no_number_is_named() -> None:
    for options, message in (
        ({"scale": "wide"}, "the scale 'wide' is not finite"),
        ({"zero_point": "low"}, "the zero point 'low' is not an integer"),
    ):
        with pytest.raises(QuantizationError, match=message):
            FakeQuantizeOp(0, 1, (2, 3), **options).validate()
    with pytest.raises(QuantizationError, match=r"t1 = .* ends at numbers, got 'low'"):
        FakeQuantizeOp(0, 1, (2, 3)).with_range("low", 1.0)


def test_a_line_that_is_no_operation_is_refused() -> None:
    with pytest.raises(QuantizationError, match="line 2 of a QuantizationGraph is 'relu'"):
        QuantizationGraph([FakeQuantizeOp(0, 1, (2,)), "relu"])
