"""Timing several ways to do the same in turns, so that a slow moment of the machine hits all."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

REPORT_EVERY = 15.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Duration:
    """Seconds that something took: passed, and of the processor, all threads together."""

    passed: float
    cpu: float


@dataclass(frozen=True)
class Spread:
    """The median of measured values and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def interleaved(
    arms: Mapping[str, Callable[[int], object]],
    rounds: int,
    *,
    warm_up: int = 0,
    start: int = 0,
    seconds: float | None = None,
    label: str = "",
    settle: bool = False,
) -> dict[str, list[Duration]]:
    """Call every arm once a round with the round's number; return how long each call took.

    Each round begins with another arm, and every second one goes through them backwards: who comes
    first finds the processor's caches cold, and who comes after whom matters too.

    Args:
        arms: name -> what is timed.
        rounds: how many rounds are timed.
        warm_up: rounds before them that are not; the numbers go on counting. Where `seconds` is
            given, a quarter of it at most, but at least two rounds.
        start: number of the first round.
        seconds: stop after the round in which so much time has passed; at least three rounds are
            timed.
        label: where given, progress goes to stderr under this name.
        settle: call every arm once before it is timed, so that it does not meet the threads of
            another library, which wait busily for a while, or what that left in the caches.
    """
    durations: dict[str, list[Duration]] = {name: [] for name in arms}
    began = reported = time.perf_counter()
    turn = timed = 0
    while timed < rounds:
        warming = turn < warm_up
        for name in in_turn(list(arms), turn):
            if settle:
                arms[name](start + turn)
            duration = _timed(arms[name], start + turn)
            if not warming:
                durations[name].append(duration)
        now = time.perf_counter()
        turn, timed = turn + 1, timed + (not warming)
        if warming and seconds is not None and turn >= 2 and now - began > seconds / 4:
            warm_up = turn
        if label and now - reported > REPORT_EVERY:
            reported = now
            print(f"  {label}: {_progress(durations, timed, rounds)}", file=sys.stderr, flush=True)
        if seconds is not None and timed >= 3 and now - began > seconds:
            break
    return durations


def _timed(call: Callable[[int], object], number: int) -> Duration:
    passed, cpu = time.perf_counter(), time.process_time()
    call(number)
    return Duration(time.perf_counter() - passed, time.process_time() - cpu)


def in_turn(names: list[str], turn: int) -> list[str]:
    """Return the order of a round: the beginning moves on, and every second round goes back."""
    first = turn // 2 % len(names)
    order = names[first:] + names[:first]
    return order if turn % 2 == 0 else order[::-1]


def ratios(own: Sequence[Duration], baseline: Sequence[Duration]) -> list[float]:
    """Return the quotient of the passed times, round by round."""
    return [a.passed / b.passed for a, b in zip(own, baseline, strict=True)]


def milliseconds(durations: Sequence[Duration]) -> float:
    """Return the median of the passed times."""
    return 1e3 * statistics.median(duration.passed for duration in durations)


def _progress(durations: Mapping[str, Sequence[Duration]], timed: int, rounds: int) -> str:
    if timed < 1:
        return "warming up"
    shown = (f"{name} {milliseconds(own):.1f}" for name, own in durations.items())
    return f"{timed} of {rounds} rounds, ms: {', '.join(shown)}"
