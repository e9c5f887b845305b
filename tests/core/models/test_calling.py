"""Calling a model with whatever the loop calls it with, without leaving a trace."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager import prepare_compression
from compression_manager.models.calling import (
    call_model,
    quiet_evaluation,
    tensors_in,
    without_labels,
)
from compression_plugins import PTQConfig

ONE, TWO = torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"a": 1, "b": 2}, ((), {"a": 1, "b": 2})),
        ((1, 2), ((1, 2), {})),
        (ONE, ((ONE,), {})),
        ([1, 2], (([1, 2],), {})),
        (None, ((None,), {})),
    ],
)
def test_call(inputs: Any, expected: Any) -> None:
    assert call_model(lambda *args, **kwargs: (args, kwargs), inputs) == expected


def test_labels_are_left_out_of_mappings() -> None:
    assert without_labels({"x": 1, "label": 2, "labels": 3}) == {"x": 1}
    assert without_labels((1, 2)) == (1, 2)


def test_tensors_are_found_in_nested_containers() -> None:
    found = list(tensors_in({"a": [ONE, (TWO, 3)], "b": "text", "c": {"d": ONE}}))
    assert len(found) == 3
    assert found[1] is TWO


class Streaming(nn.Module):
    """Counts its calls in eval mode, too, and keeps its last output."""

    calls: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        self.last = input + self.last
        return self.last


def test_quiet_evaluation_puts_buffers_back() -> None:
    model = nn.Sequential(Streaming())
    model(torch.ones(2))
    with quiet_evaluation(model, restore_buffers=True):
        assert model(torch.ones(2)).tolist() == [2.0, 2.0]
    assert model[0].calls == 1
    assert model[0].last.tolist() == [1.0, 1.0]


def test_a_model_that_counts_is_converted_and_exported_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Streaming())
    inputs = torch.rand(3, 2)
    config = PTQConfig(mode="weight_only")
    with prepare_compression(model, [config], example_inputs=inputs) as manager:
        converted = manager.convert(inputs)
        manager.export(tmp_path / "model.pt2", "torch")
        manager.report()
    assert [int(item[1].calls) for item in (model, converted)] == [0, 0]


def test_quiet_evaluation_restores_modes_and_random_state() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
    model[1].eval()
    before = (torch.get_rng_state(), random.getstate(), model[1].running_mean.clone())
    with contextlib.suppress(KeyError), quiet_evaluation(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        model(torch.rand(4, 2))
        random.random()
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert torch.equal(before[2], model[1].running_mean)
