"""What runs in a converted model's place leaves the inputs alone, as the model does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compression_manager.deploy.reference import Reference
from compression_manager.errors import ParityError


class Doubling(nn.Module):
    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, input: Tensor) -> Tensor:
        return input.mul_(2.0) if self.in_place else input * 2.0


def _in_place(input: Tensor) -> Tensor:
    return input.mul_(2.0)


def test_a_run_that_overwrites_its_inputs_is_refused_and_they_are_put_right() -> None:
    inputs = torch.randn(4, 3)
    inputs[0, 0] = float("nan")
    before = inputs.clone()
    reference = Reference.of(Doubling(in_place=False), inputs)
    with pytest.raises(ParityError, match="the copy at batch size 4 overwrites its inputs"):
        reference.compare(_in_place, 0.0, "the copy")
    assert torch.equal(inputs.nan_to_num(), before.nan_to_num())


def test_inputs_that_are_not_numbers_are_not_mistaken_for_changed_ones() -> None:
    reference = Reference.of(Doubling(in_place=False), torch.tensor([[float("inf")], [1.0]]))
    assert not reference.overwrites
    reference.inputs[1] = float("nan")
    error, _ = reference.measure(lambda input: reference.output, 0.0, "the copy")
    assert error == 0


def test_what_the_model_itself_does_is_allowed() -> None:
    reference = Reference.of(Doubling(in_place=True), torch.ones(4, 3))
    assert reference.overwrites
    reference.measure(_in_place, 0.0, "the copy")


def test_what_the_model_counts_does_not_count_its_reference() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return input

    model = Counting()
    Reference.of(model, torch.ones(4, 3))
    assert model.calls == 0


def test_model_and_run_are_compared_in_full_precision() -> None:
    class Looking(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return input

    seen: list[str] = []
    reference = Reference.of(Looking(), torch.ones(4, 3))
    count = len(seen)
    reference.measure(Looking(), 0.0, "the copy")
    assert len(seen) > count > 0
    assert set(seen) == {"ieee"}
