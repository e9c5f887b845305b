"""How far two tensors that should agree lie apart."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers so close, as a share of the largest, are the same but for the order of sums. Integers
# of a few bits have few different sums, of which many can lie on a threshold, on either side.
SAME_VALUE = 1e-6

_STEPS = 255


def steps_apart(expected: Tensor, actual: Tensor) -> Tensor:
    """Return how many of 256 steps lie between the values, none between those that are the same."""
    apart = (_steps(expected, expected) - _steps(actual, expected)).abs()
    same = SAME_VALUE * finite(expected).abs().max()
    return torch.where(difference(expected, actual).abs() <= same, 0.0, apart)


def _steps(values: Tensor, like: Tensor) -> Tensor:
    """Return on which of 256 steps over the range of `like` each value lies; float64."""
    reference = finite(like)
    low, high = reference.min(), reference.max()
    return ((finite(values) - low) * (_STEPS / (high - low).clamp(min=1e-30))).round()


def difference(expected: Tensor, actual: Tensor) -> Tensor:
    """Return expected - actual in float64, zero where both are the same infinity or NaN."""
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    return torch.where(same, 0.0, expected.double() - actual.double())


def largest_error(expected: list[Tensor], actual: list[Tensor]) -> float:
    """Return the largest relative error of a layer's outputs, of which it may have several."""
    if len(expected) != len(actual):
        return float("inf")
    pairs = zip(expected, actual, strict=True)
    return max((_relative_error(wanted, got) for wanted, got in pairs), default=0.0)


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    largest = difference(expected, actual).abs().max()
    return float(largest / finite(expected).abs().max().clamp(min=1e-30))


def finite(values: Tensor) -> Tensor:
    """Return the values in float64, with zero for what is infinite or NaN."""
    return values.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
