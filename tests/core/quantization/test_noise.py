"""Decibels of noise, against the formula and where it has no number."""

import math

import pytest
import torch

from compression_manager.quantization.noise import decibels, sqnr_db


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [
        (100.0, 1.0, 20.0),
        (1e-300, 1e300, -6000.0),
        (1e300, 1e-300, 6000.0),
        (1.0, 0.0, math.inf),
        (0.0, 0.0, math.inf),
        (0.0, 1.0, -math.inf),
        (1.0, math.inf, -math.inf),
        (1.0, math.nan, -math.inf),
        (math.inf, math.nan, -math.inf),
    ],
)
def test_decibels(signal: float, noise: float, expected: float) -> None:
    assert decibels(signal, noise) == pytest.approx(expected)


def test_of_tensors() -> None:
    exact = torch.full((4,), 1e-100, dtype=torch.float64)
    assert sqnr_db(exact, exact * 0.9) == pytest.approx(20.0)
    assert sqnr_db(exact, exact) == math.inf
    assert sqnr_db(exact, torch.full((4,), math.inf)) == -math.inf
