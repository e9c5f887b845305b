"""Memory that is written to again and again."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization.integer import scratch
from compression_manager.quantization.integer.scratch import scratch_like
from compression_manager.quantization.layers.products import last_decision
from integer_layers import quantized, run


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_buffers", scratch._Buffers())


def _codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def test_the_same_use_has_the_same_memory_and_another_its_own() -> None:
    first = scratch_like(_codes(30, 20), torch.float32, "input")
    smaller = scratch_like(_codes(3, 7), torch.float32, "input")
    half = scratch_like(_codes(3, 7), torch.bfloat16, "input")
    other = scratch_like(_codes(30, 20), torch.float32, "weight")
    assert first.data_ptr() == smaller.data_ptr() == half.data_ptr()
    assert half.dtype == torch.bfloat16
    assert smaller.shape == (3, 7)
    ends = sorted([first.data_ptr(), other.data_ptr()])
    assert ends[1] - ends[0] >= first.nbytes


def test_it_has_the_strides_of_the_tensor() -> None:
    codes = _codes(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert scratch_like(codes, torch.float32, "input").stride() == codes.stride()


def test_it_grows_from_any_size() -> None:
    for count in (1, 3, 1000, 0, 1001):
        for dtype in (torch.bfloat16, torch.float32):
            values = scratch_like(_codes(count), dtype, "input").fill_(count)
            assert values.tolist() == [float(values.new_tensor(count))] * count


def test_what_is_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_LARGEST", 100)
    first = scratch_like(_codes(26), torch.float32, "input")
    assert first.data_ptr() != scratch_like(_codes(26), torch.float32, "input").data_ptr()
    assert not scratch._buffers.kept


def test_threads_have_memory_of_their_own() -> None:
    pointers = [scratch_like(_codes(9), torch.float32, "input").data_ptr()]

    def add() -> None:
        pointers.append(scratch_like(_codes(9), torch.float32, "input").data_ptr())

    thread = threading.Thread(target=add)
    thread.start()
    thread.join()
    assert len(set(pointers)) == 2


def test_what_inference_mode_made_can_be_written_to_outside() -> None:
    with torch.inference_mode():
        scratch_like(_codes(9), torch.float32, "input").fill_(1)
    scratch_like(_codes(9), torch.float32, "input").fill_(2)


LAYERS = {
    "linear": (lambda: nn.Linear(8, 8), (8, 8)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(8, 8, 1), (2, 8, 4, 4)),
}


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("forward", ["auto", "integer"])
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_that_outlives_a_product_is_in_it(name: str, forward: str, format: Any) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    input = torch.randn(shape)
    if input.dim() == 4:
        input = input.contiguous(memory_format=format)
    layer = quantized(build(), input * 0.7, forward)
    expected, wanted = run(layer, input)
    decision = last_decision(layer.parts()[""])
    assert decision is not None
    assert decision.path in ("codes", "integer")

    leaf = input.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    output = layer(leaf)
    _spoil()
    weights = torch.linspace(-1.0, 1.0, output.numel())
    (output * weights.reshape(output.shape)).sum().backward()
    _spoil()
    assert torch.equal(output, expected)
    gradients = [leaf.grad, *(parameter.grad for parameter in layer.parameters())]
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other)


def _spoil() -> None:
    assert scratch._buffers.kept
    for kept in scratch._buffers.kept.values():
        kept.fill_(255)
