"""Observers of the smallest and largest value, per tensor or per channel."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization import Observer, QuantizationScheme, QuantizationSite


class RangeObserver(Observer):
    """Keeps one range per tensor or per channel; subclasses say how batches are combined.

    The first batch sets the range. A batch with any NaN or infinity is left out as a whole;
    an empty tensor is no batch. All updates are in place and never wait for an accelerator.

    Attributes:
        minimum, maximum: float32, () or (channels,).
        batches_observed: int64 (), batches that went into the range.
        batches_skipped: int64 (), batches left out because they were not finite.
    """

    minimum: Tensor
    maximum: Tensor
    batches_observed: Tensor
    batches_skipped: Tensor

    def __init__(self, scheme: QuantizationScheme, site: QuantizationSite) -> None:
        super().__init__()
        shape = site.range_shape(scheme)
        self._site = site
        self._axis = scheme.axis
        for name in ("minimum", "maximum"):
            self.register_buffer(name, torch.zeros(shape, device=site.device))
        for name in ("batches_observed", "batches_skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=site.device))

    @abstractmethod
    def _combine(self, batch: Tensor, kept: Tensor, *, largest: bool) -> Tensor:
        """Return the new end of the range from the batch's and the one kept so far."""

    def observe(self, input: Tensor) -> None:
        """Take the batch `input` (any shape, floating point) into account."""
        if input.numel() == 0:
            return
        low, high = self.compute_range(input)
        finite = low.isfinite().all() & high.isfinite().all()
        first = self.batches_observed == 0
        for kept, batch, largest in ((self.minimum, low, False), (self.maximum, high, True)):
            combined = torch.where(first, batch, self._combine(batch, kept, largest=largest))
            kept.copy_(torch.where(finite, combined, kept))
        self.batches_observed.add_(finite)
        self.batches_skipped.add_(finite.logical_not())

    def compute_range(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return (minimum, maximum) of `input` alone: float32, () or (channels,).

        NaN if there is any NaN; zeros for an empty tensor.

        Raises:
            QuantizationError: the channel axis is missing or has another length.
        """
        input = input.detach()
        if self._axis is not None:
            self._check_channels(input, self._axis)
        if input.numel() == 0:
            return torch.zeros_like(self.minimum), torch.zeros_like(self.maximum)
        if self._axis is None:
            low, high = torch.aminmax(input)
        else:
            # One pass each is many times faster here than torch.aminmax along a dimension.
            axis = self._axis % input.dim()
            others = [dim for dim in range(input.dim()) if dim != axis]
            low, high = (input.amin(others), input.amax(others)) if others else (input, input)
        return low.to(torch.float32), high.to(torch.float32)

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Return (minimum, maximum) of all finite batches; zeros before the first."""
        return self.minimum, self.maximum

    def has_observed(self) -> bool:
        """Return whether any finite batch was observed (synchronises with the device)."""
        return bool(self.batches_observed > 0)

    def _check_channels(self, input: Tensor, axis: int) -> None:
        expected = self.minimum.shape[0]
        if not -input.dim() <= axis < input.dim() or input.shape[axis] != expected:
            raise QuantizationError(
                f"{self._site}: expected {expected} channels along axis {axis}, got a tensor of "
                f"shape {tuple(input.shape)}."
            )


class MinMaxObserver(RangeObserver):
    """The smallest and largest value ever observed."""

    def _combine(self, batch: Tensor, kept: Tensor, *, largest: bool) -> Tensor:
        return torch.maximum(kept, batch) if largest else torch.minimum(kept, batch)


class MovingAverageObserver(RangeObserver):
    """An exponential moving average of every batch's smallest and largest value.

    range += averaging_constant * (batch - range), as torch's
    `MovingAverageMinMaxObserver`; the first batch sets the range.

    Args:
        averaging_constant: share of a new batch, in (0, 1].
    """

    def __init__(
        self, scheme: QuantizationScheme, site: QuantizationSite, averaging_constant: float = 0.01
    ) -> None:
        super().__init__(scheme, site)
        self.averaging_constant = averaging_constant

    def _combine(self, batch: Tensor, kept: Tensor, *, largest: bool) -> Tensor:
        return kept + self.averaging_constant * (batch - kept)
