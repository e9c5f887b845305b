"""Where numbers are drawn."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression_manager.run_report.axes import Axis, path, step_axis, value_axis
from compression_manager.run_report.curve import Curve

finite = st.floats(-1e300, 1e300)


@given(st.lists(finite, max_size=20), st.booleans())
def test_axis_holds_all_values_and_its_ticks(numbers: list[float], may_be_log: bool) -> None:
    axis = value_axis(numbers, 200.0, 10.0, may_be_log=may_be_log)
    for value in numbers:
        assert 10.0 <= axis.place(value) <= 200.0
    ticks = axis.ticks()
    assert ticks == sorted(ticks)
    assert len(ticks) <= 13
    for tick in ticks:
        assert 9.9 <= axis.place(tick) <= 200.1


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_linear_ticks_are_round_and_enough(low: int, extent: int) -> None:
    axis = Axis(low, low + extent, 0.0, 100.0)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 6
    step = ticks[1] - ticks[0]
    leading = step / 10.0 ** math.floor(math.log10(step * 1.0001))
    assert any(leading == pytest.approx(round_number) for round_number in (1, 2, 5))


def test_values_decades_apart_get_a_logarithmic_axis() -> None:
    axis = value_axis([0.01, 1.0, 100.0], 100.0, 0.0, may_be_log=True)
    assert axis.is_log
    assert axis.place(1.0) == pytest.approx(50.0)
    assert set(axis.ticks()) >= {0.01, 0.1, 1.0, 10.0, 100.0}


@pytest.mark.parametrize("numbers", [[1.0, 49.0], [0.0, 100.0], [-1.0, 100.0]])
def test_others_get_a_linear_one(numbers: list[float]) -> None:
    assert not value_axis(numbers, 100.0, 0.0, may_be_log=True).is_log


def test_logarithm_is_not_taken_where_it_is_not_wanted() -> None:
    assert not value_axis([1.0, 1000.0], 100.0, 0.0, may_be_log=False).is_log


def test_steps_reach_from_the_first_to_the_last() -> None:
    axis = step_axis([Curve((5, 9), (0.0, 0.0)), Curve((), ()), Curve((2,), (1.0,))], 0.0, 70.0)
    assert (axis.place(2), axis.place(9)) == (0.0, 70.0)


def test_path_is_interrupted_where_a_value_is_not_finite() -> None:
    curve = Curve((0, 1, 2, 3, 4), (0.0, 1.0, math.nan, 1.0, math.inf))
    axis = Axis(0.0, 4.0, 0.0, 4.0)
    assert path(curve, axis, axis) == "M0.0 0.0L1.0 1.0M3.0 1.0"
