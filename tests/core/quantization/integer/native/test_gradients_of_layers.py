"""Layers whose gradients are multiplied in bfloat16 by the native kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization.integer.native import NativePasses
from compression_manager.quantization.integer.selection import use_passes
from compression_manager.quantization.layers import products as layer_products
from integer_layers import quantized, run

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "padded": (lambda: nn.Conv2d(32, 40, 3, padding=1), (4, 32, 16, 16)),
    "strided": (lambda: nn.Conv2d(20, 30, 3, stride=2, padding=1, bias=False), (4, 20, 9, 8)),
    "dilated": (lambda: nn.Conv2d(16, 24, 3, dilation=2, padding=2), (3, 16, 9, 9)),
    "one axis": (lambda: nn.Conv1d(16, 24, 4, stride=3, padding=2), (3, 16, 17)),
    "three axes": (lambda: nn.Conv3d(16, 24, (1, 3, 2), padding=(0, 1, 1)), (2, 16, 3, 5, 4)),
}
CALLS = ("convolution_input_gradient", "convolution_weight_gradient")


@pytest.fixture
def calls(
    passes: NativePasses, convolution_gradients: None, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The names of the gradients that the native kernels computed."""
    # Whatever the machine's other instructions.
    monkeypatch.setattr(layer_products, "backward_of", lambda *args: "bfloat16")
    called: list[str] = []

    def recorded(name: str) -> Callable[..., Tensor]:
        function = getattr(passes, name)

        def record(*arguments: object) -> Tensor:
            called.append(name)
            result: Tensor = function(*arguments)
            return result

        return record

    for name in CALLS:
        monkeypatch.setattr(passes, name, recorded(name))
    return called


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_have_the_error_of_bfloat16(
    passes: NativePasses, calls: list[str], name: str, clips: bool, last: bool
) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, input = build(), torch.randn(shape) + 0.3
    if last and input.dim() == 4:
        input = input.contiguous(memory_format=torch.channels_last)
    twin = build()
    twin.load_state_dict(layer.state_dict())
    range_of = input * (0.7 if clips else 1.0)
    with use_passes(passes):
        _, gradients = run(quantized(layer, range_of, "integer"), input)
    assert sorted(calls) == list(CALLS)
    _, wanted = run(quantized(twin, range_of, "fake").double(), input.double())
    for got, want in zip(gradients, wanted, strict=True):
        assert got is not None
        assert want is not None
        assert got.stride() == want.stride()
        assert (got - want).abs().max() <= 1e-2 * want.abs().max()
    # What was clipped has no gradient at all.
    assert gradients[0] is not None
    assert clips == bool((gradients[0][0] == 0).any()) or name == "strided"


def test_only_what_is_wanted_is_computed(passes: NativePasses, calls: list[str]) -> None:
    layer = nn.Conv2d(16, 24, 3, padding=1)
    changed, input = quantized(layer, torch.randn(2, 16, 5, 5), "integer"), torch.randn(2, 16, 5, 5)
    with use_passes(passes):
        changed(input).sum().backward()
        assert calls == ["convolution_weight_gradient"]
        layer.get_parameter("weight").requires_grad_(False)
        changed(input.requires_grad_()).sum().backward()
    assert calls == ["convolution_weight_gradient", "convolution_input_gradient"]
    bias = layer.get_parameter("bias").grad
    assert bias is not None
    assert (bias == 2 * 2 * 25).all()


def test_groups_are_left_to_torch(passes: NativePasses, calls: list[str]) -> None:
    changed = quantized(nn.Conv2d(16, 24, 3, groups=2), torch.randn(2, 16, 5, 5), "integer")
    with use_passes(passes):
        run(changed, torch.randn(2, 16, 5, 5))
    assert calls == []
