"""Observers of the smallest and the largest value."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic import scalars
from compression_manager.quantization.observer import Observer
from compression_manager.quantization.observers.base import RangeObserver
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite


class _EndsObserver(RangeObserver):
    """Asks a batch for its two ends alone, so that those of a whole tensor may be numbers."""

    def _numbers(self, low: float, high: float) -> tuple[float, float] | None:
        """Return the range so far; None unless that and a batch's ends are to be numbers."""
        if not scalars.fit(low, high) or self._spans_ranks():
            return None
        return scalars.read(self._buffer("minimum"), self._buffer("maximum"))

    def _keep(self, low: float, high: float, batches: int) -> tuple[float, float]:
        self._buffer("minimum").fill_(low)
        self._buffer("maximum").fill_(high)
        self._buffer("batches_observed").fill_(batches)
        return low, high


class MinMaxObserver(_EndsObserver):
    """The smallest and largest value ever observed. Merging is exact, in any order."""

    def observe_ends(self, low: float, high: float) -> tuple[float, float] | None:
        """See `Observer.observe_ends`."""
        # A subclass may have an `observe` of its own.
        kept = self._numbers(low, high) if type(self) is MinMaxObserver else None
        if kept is None:
            return None
        count = int(self._buffer("batches_observed"))
        if count > 0:
            low, high = min(kept[0], low), max(kept[1], high)
        return self._keep(low, high, count + 1)

    def _take(self, input: Tensor, low: Tensor, high: Tensor, finite: Tensor) -> None:
        self._widen(low, high, finite)

    def _merge(self, other: Self) -> None:
        device = self.minimum.device
        low, high = other.minimum.to(device), other.maximum.to(device)
        self._widen(low, high, other.batches_observed.to(device) > 0)


class MovingAverageObserver(_EndsObserver):
    """An exponential moving average of every batch's smallest and largest value.

    range += averaging_constant * (batch - range), as torch's
    `MovingAverageMinMaxObserver`; the first batch sets the range. The range of a weight is that
    of its present value.

    The average depends on the order of the batches. Merging gives what one observer had after
    its own batches and then the other's, up to float32 rounding; of many batches, the last ones
    count most, so that ranks are merged in ascending order to agree.

    Args:
        averaging_constant: share of a new batch, in (0, 1].

    Raises:
        QuantizationError: `averaging_constant` is out of range.

    Attributes:
        first_minimum, first_maximum: range of the first batch, which merging needs.
    """

    first_minimum: Tensor
    first_maximum: Tensor

    def __init__(
        self, scheme: QuantizationScheme, site: QuantizationSite, averaging_constant: float = 0.01
    ) -> None:
        super().__init__(scheme, site)
        if not 0.0 < averaging_constant <= 1.0:
            raise QuantizationError(
                f"{site}: an averaging constant is above 0 and at most 1, got "
                f"{averaging_constant!r}."
            )
        self.averaging_constant = averaging_constant
        for name in ("first_minimum", "first_maximum"):
            self._add_range(name)

    def observe(self, input: Tensor) -> None:
        """Take the batch `input` into account, the ends of a whole one on the CPU as numbers."""
        if self._takes_numbers(input):
            ends = scalars.read(*self._extremes(input.detach()))
            if ends is not None and self.observe_ends(*ends) is not None:
                return
        super().observe(input)

    def _takes_numbers(self, input: Tensor) -> bool:
        whole = self.minimum.dim() == 0 and input.is_cpu and input.numel() > 0
        return whole and not torch.compiler.is_compiling() and not self._spans_ranks()

    def observe_ends(self, low: float, high: float) -> tuple[float, float] | None:
        """See `Observer.observe_ends`."""
        # A subclass may have an `observe` of its own.
        kept = self._numbers(low, high) if type(self) is MovingAverageObserver else None
        if kept is None:
            return None
        count = int(self._buffer("batches_observed"))
        if count == 0:
            self.first_minimum.fill_(low)
            self.first_maximum.fill_(high)
        else:
            low = scalars.moving_average(kept[0], low, self.averaging_constant)
            high = scalars.moving_average(kept[1], high, self.averaging_constant)
        return self._keep(low, high, count + 1)

    def _take(self, input: Tensor, low: Tensor, high: Tensor, finite: Tensor) -> None:
        first = self.batches_observed == 0
        starts = first & finite
        ends = (
            (self.minimum, self.first_minimum, low),
            (self.maximum, self.first_maximum, high),
        )
        for kept, initial, batch in ends:
            averaged = kept + self.averaging_constant * (batch - kept)
            kept.copy_(torch.where(finite, torch.where(first, batch, averaged), kept))
            initial.copy_(torch.where(starts, batch, initial))

    def _merge(self, other: Self) -> None:
        """Shift the other's average by what its first batch lacks of one's own.

        After n batches b_1 ... b_n that follow a range r, the average is (1 - c)^n r + c sum of
        (1 - c)^(n - i) b_i. Started anew, it has b_1 in the place of r.
        """
        device = self.minimum.device
        count = other.batches_observed.to(device)
        is_empty, adds = self.batches_observed == 0, count > 0
        remaining = torch.pow(1.0 - self.averaging_constant, count.to(torch.float32))
        for end in ("minimum", "maximum"):
            kept, initial = getattr(self, end), getattr(self, f"first_{end}")
            theirs = getattr(other, end).to(device)
            start = getattr(other, f"first_{end}").to(device)
            merged = torch.where(is_empty, theirs, theirs + remaining * (kept - start))
            kept.copy_(torch.where(adds, merged, kept))
            initial.copy_(torch.where(adds & is_empty, start, initial))

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "averaging_constant": self.averaging_constant}


def gives_own_range(observer: Observer) -> bool:
    """Return whether the range of a weight reaches from its smallest value to its largest one."""
    return type(observer) in (MinMaxObserver, MovingAverageObserver)
