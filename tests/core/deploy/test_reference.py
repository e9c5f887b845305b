"""What runs in a converted model's place leaves the inputs alone, as the model does."""

from __future__ import annotations

import math
from typing import Any

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


def _reference(output: Any, in_float32: Any = None) -> Reference:
    kept = output if in_float32 is None else in_float32
    return Reference(torch.ones(4, 3), output, kept, overwrites=False)


def test_either_arithmetic_is_the_models() -> None:
    exact, rounded = torch.ones(4, 2), torch.full((4, 2), 2.0)
    reference = _reference(exact, rounded)
    for output in (exact, rounded):
        assert reference.measure(lambda input, output=output: output, 0.1, "the copy") == (0, 0.1)
    assert reference.measure(lambda input: rounded * 2, 0.1, "the copy") == (1, 0.1)


def test_outputs_that_are_not_numbers_are_no_agreement() -> None:
    with pytest.raises(ParityError, match="the copy at batch size 4 returns other outputs"):
        _reference(torch.ones(4, 2)).compare(lambda input: input[:, :2] * math.nan, 0.1, "the copy")


def test_integers_are_compared_by_how_many_differ() -> None:
    logits, classes, none = torch.ones(4, 2), torch.arange(4), torch.zeros(0, dtype=torch.long)
    reference = _reference((logits, classes, none))
    others = torch.tensor([0, 9, 2, 3])
    error, _ = reference.measure(lambda input: (logits, others, none), 0.1, "the copy")
    assert error == 0.25
    error, _ = reference.measure(lambda input: (logits * 1.5, others, none), 0.1, "the copy")
    assert error == 0.5


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (torch.ones(4, 2, dtype=torch.float64), r"float64 \(4, 2\)"),
        (torch.ones(4, 1), r"float32 \(4, 1\)"),
        (None, "no tensor"),
    ],
)
def test_other_types_and_shapes_are_refused(output: Any, shown: str) -> None:
    with pytest.raises(ParityError, match=rf"returns {shown} instead of float32 \(4, 2\)"):
        _reference(torch.ones(4, 2)).measure(lambda input: output, 0.1, "the copy")
