"""Memory that is written to again and again."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization.integer import scratch
from compression_manager.quantization.integer.scratch import claim, hold, values_of
from compression_manager.quantization.layers.decisions import last_decision
from integer_layers import quantized, run


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_buffers", scratch._Buffers())


def _codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def _claimed(*shape: int, dtype: torch.dtype = torch.float32, use: str = "input") -> Tensor:
    memory = claim(_codes(*shape), dtype, use)
    assert memory is not None
    return memory


def test_the_same_use_has_the_same_memory_and_another_its_own() -> None:
    first = _claimed(30, 20)
    smaller = _claimed(3, 7)
    half = _claimed(3, 7, dtype=torch.bfloat16)
    other = _claimed(30, 20, use="weight")
    assert first.data_ptr() == smaller.data_ptr() == half.data_ptr()
    assert half.dtype == torch.bfloat16
    assert smaller.shape == (3, 7)
    ends = sorted([first.data_ptr(), other.data_ptr()])
    assert ends[1] - ends[0] >= first.nbytes


def test_what_outgrew_its_memory_leaves_none_behind() -> None:
    _claimed(3, 7)
    larger = _claimed(30, 20)
    assert _claimed(3, 7).data_ptr() == larger.data_ptr()


def test_it_has_the_strides_of_the_tensor() -> None:
    codes = _codes(2, 3, 4, 5)
    for _ in range(2):
        for format in (torch.channels_last, torch.contiguous_format):
            ordered = codes.contiguous(memory_format=format)
            memory = claim(ordered, torch.float32, "input")
            assert memory is not None
            assert memory.stride() == ordered.stride()


def test_it_grows_from_any_size() -> None:
    for count in (1, 3, 1000, 0, 1001):
        for dtype in (torch.bfloat16, torch.float32):
            values = _claimed(count, dtype=dtype).fill_(count)
            assert values.tolist() == [float(values.new_tensor(count))] * count


def test_memory_of_short_elements_serves_longer_ones() -> None:
    half = _claimed(3, dtype=torch.bfloat16)
    assert _claimed(1).data_ptr() == half.data_ptr()


def test_what_is_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_LARGEST", 100)
    assert claim(_codes(26), torch.float32, "input") is None
    writes = Writes()
    codes = _codes(26)
    first = writes.values(codes)
    assert first.data_ptr() != writes.values(codes).data_ptr()
    assert writes.count == 2
    images = _codes(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert writes.values(images).stride() == images.stride()
    assert not scratch._buffers.kept


def test_numbers_lie_where_their_integers_do() -> None:
    codes = torch.empty(9, dtype=torch.int8, device="meta")
    assert claim(codes, torch.float32, "input") is None
    assert values_of(codes, torch.float32, "input", lambda out: None).device == codes.device
    assert not scratch._buffers.kept
    codes = _codes(9)
    with torch.device("meta"):
        assert values_of(codes, torch.float32, "input", lambda out: None).device == codes.device


def test_shapes_without_end_take_no_memory_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_MANY", 4)
    writes = Writes()
    for length in range(20, 1, -1):  # of which the first has memory for all
        codes = _codes(length)
        assert writes.values(codes) is writes.values(codes)
        assert len(scratch._buffers.shaped) <= 4
    assert writes.count == 19


def test_threads_have_memory_of_their_own() -> None:
    pointers = [_claimed(9).data_ptr()]

    def add() -> None:
        pointers.append(_claimed(9).data_ptr())

    thread = threading.Thread(target=add)
    thread.start()
    thread.join()
    assert len(set(pointers)) == 2


def test_what_inference_mode_made_can_be_written_to_outside() -> None:
    with torch.inference_mode():
        _claimed(9).fill_(1)
    _claimed(9).fill_(2)


class Writes:
    """Writes the number of the write."""

    def __init__(self) -> None:
        self.count = 0

    def values(
        self, codes: Tensor, dtype: torch.dtype = torch.float32, use: str = "input"
    ) -> Tensor:
        return values_of(codes, dtype, use, self._write)

    def _write(self, out: Tensor) -> None:
        self.count += 1
        out.fill_(self.count)


def test_values_are_written_once_for_the_same_integers() -> None:
    writes, codes, others = Writes(), _codes(4, 5), _codes(4, 5)
    assert [float(writes.values(codes)[0, 0]) for _ in range(2)] == [1.0, 1.0]
    assert float(writes.values(others)[0, 0]) == 2.0  # in the same memory
    assert float(writes.values(codes)[0, 0]) == 3.0
    assert float(writes.values(codes, torch.bfloat16)[0, 0]) == 4.0
    assert float(writes.values(codes)[0, 0]) == 5.0
    assert float(writes.values(others, use="weight")[0, 0]) == 6.0
    assert float(writes.values(codes)[0, 0]) == 5.0


def test_who_claims_memory_ends_what_it_held() -> None:
    writes, codes = Writes(), _codes(4, 5)
    writes.values(codes)
    _claimed(2, 2)
    writes.values(codes)
    assert writes.count == 2
    made = _claimed(4, 5).fill_(7.0)
    hold("input", codes, made)
    assert writes.values(codes) is made
    assert writes.count == 2


def test_values_outlive_shapes_that_others_made_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_MANY", 1)
    writes, codes = Writes(), _codes(9)
    held = writes.values(codes)
    _claimed(5, use="weight")
    assert writes.values(codes) is held
    assert writes.count == 1


def test_new_integers_at_an_old_address_have_values_of_their_own() -> None:
    writes, memory = Writes(), torch.zeros(20, dtype=torch.int8)
    writes.values(memory[:9])  # which nobody keeps
    assert float(writes.values(memory[:9])[0]) == 2.0


def test_what_could_not_be_written_is_not_held() -> None:
    def fail(out: Tensor) -> None:
        raise MemoryError

    writes, codes = Writes(), _codes(9)
    writes.values(codes)
    with pytest.raises(MemoryError):
        values_of(_codes(9), torch.float32, "input", fail)
    writes.values(codes)
    assert writes.count == 2


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
    scratch._buffers.held.clear()  # as whoever writes to it does
