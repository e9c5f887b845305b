"""Arithmetic on Python numbers equals that of float32 tensors, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression_manager.quantization import (
    MinMaxObserver,
    MovingAverageObserver,
    QuantizationScheme,
    QuantizationSite,
    choose_qparams,
)
from compression_manager.quantization.arithmetic import scalars
from compression_manager.quantization.observers import RangeObserver

# What `fit` accepts.
LARGEST = float(np.nextafter(np.finfo(np.float32).max / np.float32(4), np.float32(0)))
NUMBERS = st.floats(-LARGEST, LARGEST, width=32)
SCHEMES = [
    QuantizationScheme(bits=8, symmetric=False, signed=False),
    QuantizationScheme(bits=8, symmetric=False),
    QuantizationScheme(bits=3, symmetric=False, signed=False),
    QuantizationScheme(bits=1, symmetric=False),
]


@given(NUMBERS, NUMBERS, st.sampled_from(SCHEMES))
def test_scales_are_those_of_tensors(one: float, other: float, scheme: QuantizationScheme) -> None:
    low, high = min(one, other), max(one, other)
    assert scalars.serve(scheme)
    assert scalars.fit(low, high)
    scale, zero_point = scalars.affine_qparams(low, high, scheme)
    expected = choose_qparams(torch.tensor(low), torch.tensor(high), scheme)
    assert scale == expected[0].item()
    assert zero_point == expected[1].item()


@given(NUMBERS, NUMBERS, st.floats(1e-6, 1.0))
def test_moving_averages_are_those_of_numpy(kept: float, batch: float, constant: float) -> None:
    a, b, c = (np.float32(value) for value in (kept, batch, constant))
    assert scalars.moving_average(kept, batch, constant) == a + c * (b - a)


@pytest.mark.parametrize("kind", [MinMaxObserver, MovingAverageObserver])
@pytest.mark.parametrize("last", [0.5, torch.nan, torch.inf, 3e38, -3e38])
def test_observers_of_ends_are_those_of_tensors(kind: type[RangeObserver], last: float) -> None:
    scheme, site = SCHEMES[0], QuantizationSite("layer", "activation")
    by_ends, by_tensor, slow = (kind(scheme, site) for _ in range(3))
    for seed in range(4):
        batch = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        if seed == 3:
            batch[7] = last
        ends = float(batch.min()), float(batch.max())
        if by_ends.observe_ends(*ends) is None:
            assert seed == 3  # and its value too far away
            assert last != 0.5
            by_ends.observe(batch)
        by_tensor.observe(batch)
        RangeObserver.observe(slow, batch)
    for name, expected in slow.state_dict().items():
        assert torch.equal(by_ends.state_dict()[name], expected), name
        assert torch.equal(by_tensor.state_dict()[name], expected), name


def test_ends_answer_the_range_and_are_refused_by_subclasses() -> None:
    scheme, site = SCHEMES[0], QuantizationSite("layer", "activation")

    class Own(MinMaxObserver):
        pass

    assert Own(scheme, site).observe_ends(-1.0, 1.0) is None
    observer = MinMaxObserver(scheme, site)
    assert observer.observe_ends(-1.0, 2.0) == (-1.0, 2.0)
    assert observer.observe_ends(-0.5, 3.0) == (-1.0, 3.0)


def test_large_or_absent_numbers_are_left_to_tensors() -> None:
    one = torch.tensor(1.0)
    assert scalars.read(one, torch.tensor(-2.0)) == (1.0, -2.0)
    for limit in (torch.tensor(torch.nan), torch.tensor(3e38), torch.tensor([1.0])):
        assert scalars.read(one, limit) is None
        assert scalars.read(limit, one) is None
    assert not scalars.serve(QuantizationScheme(bits=8, symmetric=True))
