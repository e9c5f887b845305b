"""How far outputs lie apart: steps of 8 bits, and relative errors, infinities and NaN left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compression_manager.deploy.differences import largest_error, steps_apart

INFINITY, NAN = math.inf, math.nan


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.01, 3.0])
def test_steps_are_those_of_the_expected_range(factor: float) -> None:
    expected = np.random.default_rng(0).normal(size=1000)
    actual = expected * factor
    ends = expected.min(), expected.max()
    steps = [np.rint((x - ends[0]) * 255 / (ends[1] - ends[0])) for x in (expected, actual)]
    found = steps_apart(torch.tensor(expected), torch.tensor(actual))
    np.testing.assert_array_equal(found.numpy(), np.abs(steps[0] - steps[1]))


@pytest.mark.parametrize("value", [INFINITY, -INFINITY, NAN])
def test_what_is_not_finite_hides_no_steps(value: float) -> None:
    expected, actual = torch.tensor([[0.0, 255.0, 7.0, value], [3.0, 255.0, 5.0, value]])
    assert steps_apart(expected, actual).tolist() == [3, 0, 2, 0]


def test_a_constant_has_a_range_of_nothing() -> None:
    zeros = torch.zeros(3)
    assert steps_apart(zeros, zeros).tolist() == [0, 0, 0]
    apart = steps_apart(zeros, torch.tensor([0.0, 1e-3, -1e-3]))
    assert apart[0] == 0
    assert bool((apart[1:] > 1).all())
    assert largest_error([zeros], [zeros]) == 0
    assert largest_error([zeros], [zeros + 1e-3]) > 1


def test_the_error_is_a_share_of_the_largest_finite_output_of_the_worst_tensor() -> None:
    expected = [torch.tensor([1.0, -4.0, INFINITY, NAN]), torch.tensor([10.0]), torch.zeros(0)]
    actual = [torch.tensor([1.5, -3.0, INFINITY, NAN]), torch.tensor([11.0]), torch.zeros(0)]
    assert largest_error(expected, actual) == 0.25
    assert largest_error([], []) == 0
    half = torch.tensor([60_000.0], dtype=torch.float16)
    assert largest_error([half], [-half]) == 2


@pytest.mark.parametrize("value", [INFINITY, -INFINITY, NAN])
def test_what_is_not_finite_agrees_with_its_like_alone(value: float) -> None:
    numbers, others = torch.tensor([1.0, 2.0]), torch.tensor([1.0, value])
    assert largest_error([others], [others.clone()]) == 0
    for expected, actual in ((numbers, others), (others, numbers)):
        assert not largest_error([expected], [actual]) < INFINITY
    assert not largest_error([torch.tensor([INFINITY])], [torch.tensor([-INFINITY])]) < INFINITY


@pytest.mark.parametrize("actual", [[torch.ones(2)] * 2, [torch.ones(1, 2)], [], [torch.ones(1)]])
def test_outputs_of_other_numbers_or_shapes_have_nothing_in_common(
    actual: list[torch.Tensor],
) -> None:
    assert largest_error([torch.ones(2)], actual) == INFINITY
