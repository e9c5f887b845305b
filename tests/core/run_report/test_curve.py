"""Thinned and smoothed curves look like the whole one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression_manager.run_report.curve import Curve, smoothed, thinned

values = st.lists(
    st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=400
)


def _curve(numbers: list[float]) -> Curve:
    return Curve(tuple(range(10, 10 + 3 * len(numbers), 3)), tuple(numbers))


@given(values, st.integers(8, 60))
def test_thinned_curve_is_a_part_of_the_whole(numbers: list[float], limit: int) -> None:
    curve = _curve(numbers)
    thin = thinned(curve, limit)
    assert len(thin.steps) == len(thin.values) <= limit
    assert list(thin.steps) == sorted(set(thin.steps))
    whole = dict(zip(curve.steps, map(repr, curve.values), strict=True))
    assert all(whole[s] == repr(v) for s, v in zip(thin.steps, thin.values, strict=True))


@given(values, st.integers(8, 60))
def test_thinned_curve_keeps_ends_spikes_and_gaps(numbers: list[float], limit: int) -> None:
    curve = _curve(numbers)
    thin = thinned(curve, limit)
    assert (thin.steps[0], thin.steps[-1]) == (curve.steps[0], curve.steps[-1])
    assert bool(curve.finite()) == bool(thin.finite())
    if curve.finite():
        assert min(thin.finite()) == min(curve.finite())
        assert max(thin.finite()) == max(curve.finite())
    gaps = len(curve.finite()) < len(curve.values)
    assert gaps == (len(thin.finite()) < len(thin.values))


def test_short_curve_stays_as_it_is() -> None:
    curve = _curve([3.0, 1.0, 2.0])
    assert thinned(curve, 8) is curve


def test_smoothed_values_are_means_at_middle_steps() -> None:
    curve = Curve((1, 2, 3, 4, 5, 6), (1.0, 2.0, 6.0, 4.0, math.nan, 0.0))
    assert smoothed(curve, 2) == Curve((2,), (3.0,))
    assert smoothed(curve, 3) == Curve((1, 3), (1.5, 5.0))


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 0.0), (9, 8.0), (20, 18.5), (100, 94.5)], ids=str
)
def test_recent_mean_is_that_of_the_last_tenth(count: int, expected: float) -> None:
    assert _curve([float(index) for index in range(count)]).recent_mean() == expected


def test_recent_mean_with_a_gap_is_not_a_number() -> None:
    assert math.isnan(_curve([1.0, math.inf]).recent_mean())
