"""How long layers take beside float32, on a machine that does other things as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compression_manager.report import layer_measurements


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def function(self, *seconds: float) -> Callable[[], object]:
        """What takes each of these times in turn, and then the last for ever."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(layer_measurements.time, "perf_counter", lambda: made.now)
    return made


def test_a_disturbed_call_and_the_first_do_not_count(clock: Clock) -> None:
    # Half as long as the float kernel at best, and disturbed more often than not.
    layer = clock.function(9.0, 0.004, 0.007, 0.001, 0.005)
    ratio = layer_measurements._time_ratio(layer, clock.function(0.002))
    assert ratio == pytest.approx(0.5)


def test_a_layer_that_takes_long_is_timed_once(clock: Clock) -> None:
    ratio = layer_measurements._time_ratio(clock.function(3.0), clock.function(2.0))
    assert ratio == pytest.approx(1.5)
    assert clock.now == pytest.approx(3.0 + 5.0)
