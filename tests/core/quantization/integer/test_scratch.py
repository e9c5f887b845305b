"""Memory that is written to again and again."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization.integer import scratch
from compression_manager.quantization.integer.scratch import scratch_like
from integer_layers import quantized


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


@pytest.mark.parametrize("forward", ["auto", "integer"])
def test_results_do_not_share_it(forward: str) -> None:
    torch.manual_seed(0)
    layers = [quantized(nn.Linear(8, 8), torch.randn(8, 8), forward) for _ in range(2)]
    inputs = [torch.randn(8, 8).requires_grad_() for _ in layers]
    outputs = [layer(input) for layer, input in zip(layers, inputs, strict=True)]
    before = [output.detach().clone() for output in outputs]
    gradients = torch.autograd.grad(sum(output.square().sum() for output in outputs), inputs)
    kept = [gradient.clone() for gradient in gradients]
    for use in ("input", "weight"):
        scratch_like(_codes(8, 8), torch.float32, use).fill_(torch.nan)
    assert all(map(torch.equal, outputs, before))
    assert all(map(torch.equal, gradients, kept))
