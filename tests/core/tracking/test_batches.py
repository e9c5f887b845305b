"""What a model is called with, found in batches."""

import pytest
import torch
from torch import nn

from compression_manager import ConfigError
from compression_manager.tracking.batches import inputs_of, number_of_batches, to_device_of

INPUT, TARGET = torch.randn(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (INPUT, INPUT),
        ((INPUT, TARGET), INPUT),
        ([INPUT, TARGET], INPUT),
        ((INPUT,), INPUT),
    ],
)
def test_tensors(batch, expected):
    assert inputs_of(batch, source="data", otherwise="forward=...") is expected


def test_several_inputs_and_mappings():
    assert inputs_of(((INPUT, TARGET), TARGET), source="", otherwise="") == (INPUT, TARGET)
    found = inputs_of({"x": INPUT, "labels": TARGET}, source="", otherwise="")
    assert list(found) == ["x"]


@pytest.mark.parametrize("batch", [(), [], (INPUT, INPUT, TARGET)])
def test_other_numbers_of_parts_are_refused(batch):
    with pytest.raises(ConfigError, match=rf"data has {len(batch)} parts.*pass forward=\.\.\."):
        inputs_of(batch, source="data", otherwise="forward=...")


def test_everything_moves_to_the_models_device():
    model = nn.Linear(3, 2, device="meta")
    moved = to_device_of(model, {"x": [INPUT, 3], "y": (TARGET,)})
    assert moved["x"][0].device.type == moved["y"][0].device.type == "meta"
    assert moved["x"][1] == 3
    spread = nn.Sequential(model, nn.Linear(2, 2))
    assert to_device_of(spread, INPUT) is INPUT


@pytest.mark.parametrize(
    ("batches", "limit", "expected"),
    [
        ([1, 2, 3], None, 3),
        ([1, 2, 3], 2, 2),
        ([1, 2, 3], 5, 3),
        (iter([1]), 5, 5),
        (iter([]), None, None),
    ],
)
def test_number_of_batches(batches, limit, expected):
    assert number_of_batches(batches, limit) == expected
