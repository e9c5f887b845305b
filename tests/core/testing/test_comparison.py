"""States are compared bit for bit, and differences are located."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from compression_manager.testing import assert_identical, differences

EQUAL: list[Any] = [
    torch.tensor([1.0, math.nan, math.inf]),
    torch.zeros(0, 3),
    torch.tensor(True),
    torch.tensor([1, 2], dtype=torch.int8),
    torch.tensor(1.5, dtype=torch.bfloat16),
    torch.tensor([1 + 2j, complex(math.nan, 0)]),
    {"a": [1, (2.0, math.nan), None], 3: "text"},
    np.array([1, 2], dtype=np.uint32),
]


@pytest.mark.parametrize("value", EQUAL, ids=repr)
def test_equal_values_have_no_differences(value: Any) -> None:
    copied = value.clone() if isinstance(value, torch.Tensor) else value
    assert differences(copied, value) == []


DIFFERENT: list[tuple[Any, Any, str]] = [
    (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), "state: 1 of 2 elements differ"),
    (torch.tensor([math.nan]), torch.tensor([0.0]), "state: 1 of 1 elements differ"),
    (torch.zeros(2), torch.zeros(2, 1), "float32 of shape (2,) instead of float32 of shape (2, 1)"),
    (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "instead of float64 of shape (2,)"),
    ({"a": {"b": 1}}, {"a": {"b": 2}}, "state.a.b: 1 instead of 2"),
    ({"a": 1, "b": 2}, {"a": 1, "c": 2}, "state: b should not be there; c is missing"),
    ([1, [2, 3]], [1, [2, 4]], "state[1][1]: 3 instead of 4"),
    ([1], [1, 2], "state: 1 items instead of 2"),
    ((1,), [1], "state: tuple instead of list"),
    (1, True, "state: int instead of bool"),
    (1.0, math.nan, "state: 1.0 instead of nan"),
    (np.array([1, 2]), np.array([1, 3]), "state: another ndarray"),
]


@pytest.mark.parametrize(("actual", "expected", "text"), DIFFERENT)
def test_differences_are_located(actual: Any, expected: Any, text: str) -> None:
    [line] = differences(actual, expected)
    assert text in line
    with pytest.raises(AssertionError) as error:
        assert_identical(actual, expected)
    assert str(error.value) == line


def test_every_place_is_named() -> None:
    actual = {"a": torch.zeros(2), "b": [1, 2]}
    expected = {"a": torch.ones(2), "b": [1, 3]}
    assert differences(actual, expected, "x") == [
        "x.a: 2 of 2 elements differ",
        "x.b[1]: 2 instead of 3",
    ]
