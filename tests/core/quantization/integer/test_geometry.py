"""Convolutions that read nothing but padding, by brute force and by the layers themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from compression_manager import prepare_compression
from compression_manager.quantization.integer.geometry import Geometry
from compression_plugins import PTQConfig

AXIS = st.tuples(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(1, 4)
)


@given(st.lists(AXIS, min_size=1, max_size=3), st.integers(1, 2))
def test_every_place_and_every_tap_is_looked_at(
    axes: list[tuple[int, int, int, int, int]], depth: int
) -> None:
    computed = True
    for length, extent, stride, padding, dilation in axes:
        places = (length + 2 * padding - dilation * (extent - 1) - 1) // stride + 1
        assume(places > 0)
        meets = [
            [
                0 <= place * stride - padding + tap * dilation < length
                for tap in range(extent)
            ]
            for place in range(places)
        ]  # fmt: skip
        computed &= all(map(any, meets)) and (depth > 1 or all(map(any, zip(*meets, strict=True))))
    size, kernel, *options = zip(*axes, strict=True)
    geometry = Geometry(*options, groups=1)
    assert geometry.is_computed_by_onednn(size, kernel, depth) == computed


@given(AXIS, st.integers(1, 2))
def test_what_is_said_of_an_open_axis_holds_for_every_length(
    axis: tuple[int, int, int, int, int], depth: int
) -> None:
    _, extent, stride, padding, dilation = axis
    geometry = Geometry((stride,), (padding,), (dilation,), groups=1)
    if geometry.is_computed_by_onednn([None], [extent], depth):
        lengths = range(1, 24)
        fits = [length for length in lengths if geometry.places([length], [extent])[0] > 0]
        assert all(geometry.is_computed_by_onednn([n], [extent], depth) for n in fits)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(1, 16, 3, padding=3), (4, 1, 28, 28)),
        (lambda: nn.Conv2d(4, 16, 3, padding=3), (4, 4, 28, 28)),
        (lambda: nn.Conv3d(1, 16, 3, padding=1), (4, 1, 1, 16, 16)),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 4, 1, 16)),
        (lambda: nn.Conv1d(4, 8, 2, padding=4, dilation=8), (4, 4, 1)),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_layers_compute_what_fake_quantization_does(
    make: Callable[[], nn.Conv2d], shape: tuple[int, ...], training: bool
) -> None:
    torch.manual_seed(0)
    layer, inputs = make(), torch.randn(shape)
    model = nn.Sequential(layer)
    manager = prepare_compression(model, [PTQConfig(calibration_data=[inputs])])
    model.train(training)
    quantizer: Callable[[Tensor], Tensor] = layer.input_quantizer
    with torch.no_grad():
        expected = layer._conv_forward(quantizer(inputs), layer.quantized_weight(), layer.bias)
        torch.testing.assert_close(model(inputs), expected, rtol=1e-6, atol=1e-6)
        converted = manager.convert(inputs)
        torch.testing.assert_close(converted(inputs), expected, rtol=1e-6, atol=1e-6)
    assert "reads padding only" in str(manager.report())
    manager.close()
