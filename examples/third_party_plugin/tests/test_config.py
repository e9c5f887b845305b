"""The options, and the schedule against its formula."""

from __future__ import annotations

from typing import Any

import pytest
from compression_magnitude_pruning import MagnitudePruningConfig
from hypothesis import given
from hypothesis import strategies as st

from compression_manager import ConfigError, StartAt

POINT = {"step": lambda n: StartAt(step=n), "epoch": lambda n: StartAt(epoch=n)}


@given(
    unit=st.sampled_from(["step", "epoch"]),
    start=st.integers(0, 20),
    length=st.integers(1, 50),
    every=st.integers(1, 10),
    shares=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
)
def test_cubic_schedule(
    unit: str, start: int, length: int, every: int, shares: tuple[float, float]
) -> None:
    first, last = sorted(shares)
    config = MagnitudePruningConfig(
        last,
        start=POINT[unit](start),
        end=POINT[unit](start + length),
        initial_sparsity=first,
        every=every,
    )
    found = [config.sparsity_at(**{"step": 0, "epoch": 0, unit: t}) for t in range(100)]
    assert found[:start] == [0] * start
    assert found[start] == pytest.approx(first)
    assert set(found[start + length :]) == {last}
    for passed in range(0, length, every):
        expected = last + (first - last) * (1 - passed / length) ** 3
        held = found[start + passed : start + min(passed + every, length)]
        assert held == pytest.approx([expected] * len(held))
    assert found == pytest.approx(sorted(found))


def test_without_an_end_all_is_pruned_at_the_start() -> None:
    config = MagnitudePruningConfig(0.7, start=StartAt(step=3))
    assert [config.sparsity_at(step=t, epoch=9) for t in (2, 3, 4)] == [0.0, 0.7, 0.7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity takes a number from 0 to below 1; got 1.0"),
        ({"sparsity": True}, "sparsity takes"),
        ({"sparsity": float("nan")}, "sparsity takes"),
        ({"initial_sparsity": 0.6}, r"initial_sparsity takes a number from 0 to sparsity \(0.5\)"),
        ({"end": StartAt(epoch=2)}, "end takes the same unit as start"),
        ({"start": StartAt(step=2), "end": StartAt(step=2)}, "end takes a point after the start"),
        ({"every": 0}, "every takes a whole number from 1"),
        ({"scope": "model"}, "scope takes 'layer' or 'global'; got 'model'"),
        ({"include": "fc*"}, "include takes a list of names"),
        ({"exclude": [3]}, "exclude takes a list of names"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MagnitudePruningConfig(**options)
