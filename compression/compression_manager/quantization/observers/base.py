"""What all built-in observers share: buffers, the policy for NaN and infinity, and merging."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic.ranges import range_shape, tensor_range
from compression_manager.quantization.observer import Observer
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite
from compression_manager.ranks import has_other_ranks, maximum_of_ranks


class RangeObserver(Observer):
    """Base of the built-in observers.

    A batch with any NaN or infinity is left out as a whole and counted; an empty tensor is no
    batch. All updates are in place and never wait for an accelerator.

    With `synchronize`, and where torch.distributed has more than one rank, a batch is what all
    ranks observe in one call: the state is then that of one observer of the concatenated tensors,
    equal on all ranks. A batch that is not finite on one rank is left out on all; a rank whose
    tensor is empty takes part as well.

    Attributes:
        minimum, maximum: float32, in the shape of the scales; zeros before the first batch.
        batches_observed: int64 (), batches that went into the range.
        batches_skipped: int64 (), batches left out because they were not finite.
    """

    minimum: Tensor
    maximum: Tensor
    batches_observed: Tensor
    batches_skipped: Tensor

    def __init__(self, scheme: QuantizationScheme, site: QuantizationSite) -> None:
        super().__init__()
        self._scheme = scheme
        self._site = site
        for name in ("minimum", "maximum"):
            self._add_range(name)
        for name in ("batches_observed", "batches_skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=site.device))

    def observe(self, input: Tensor) -> None:
        """Take the batch `input` (floating point; any shape with the scheme's axis) into account.

        Raises:
            QuantizationError: the channel axis is missing or has another length.
        """
        input = input.detach()
        if self._spans_ranks():
            low, high, finite, skipped = self._extremes_of_ranks(input)
        elif input.numel() == 0:
            return
        else:
            low, high = self._extremes(input)
            finite = low.isfinite().all() & high.isfinite().all()
            skipped = finite.logical_not()
        self._take(input, low, high, finite)
        self.batches_observed.add_(finite)
        self.batches_skipped.add_(skipped)

    def compute_range(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return (minimum, maximum) of `input` alone: float32, in the shape of the scales.

        NaN where there is any NaN; zeros for an empty tensor.

        Raises:
            QuantizationError: the channel axis is missing or has another length.
        """
        return self._extremes(input)

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Return (minimum, maximum) of all finite batches; zeros before the first."""
        return self.minimum, self.maximum

    def has_observed(self) -> bool:
        """Return whether any finite batch was observed (synchronises with the device)."""
        return bool(self.batches_observed > 0)

    def merge(self, other: Observer) -> None:
        """Take into account what `other` observed, as if its batches came after one's own.

        Args:
            other: an observer of the same class, scheme and settings; it is not changed.

        Raises:
            QuantizationError: `other` differs in one of these.
        """
        if type(other) is not type(self) or not isinstance(other, type(self)):
            raise QuantizationError(
                f"{self._site}: a {type(self).__name__} merges with its own kind only, "
                f"got a {type(other).__name__}."
            )
        mine, theirs = self._settings(), other._settings()
        for name, value in mine.items():
            if value != theirs[name]:
                raise QuantizationError(
                    f"{self._site}: cannot merge observers of different {name}: {value} here, "
                    f"{theirs[name]} in the other."
                )
        self._merge(other)
        for name in ("batches_observed", "batches_skipped"):
            getattr(self, name).add_(getattr(other, name).to(self.minimum.device))

    @abstractmethod
    def _take(self, input: Tensor, low: Tensor, high: Tensor, finite: Tensor) -> None:
        """Update the state by a batch, unless `finite` (bool ()) is false.

        Args:
            input: the batch, or this rank's part of it, which alone may be empty.
            low: the batch's smallest values, float32 in the shape of the scales.
            high: its largest values.
            finite: whether the whole batch is finite; not to be read back.
        """

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Update the state, but for the counts of batches, by that of a matching observer."""

    def _settings(self) -> dict[str, Any]:
        """Return what two observers must have in common to be merged."""
        return {"scheme": str(self._scheme), "shape": tuple(self.minimum.shape)}

    def _add_range(self, name: str) -> None:
        shape = self._site.range_shape(self._scheme)
        zeros = torch.zeros(shape, dtype=torch.float32, device=self._site.device)
        self.register_buffer(name, zeros)

    def _widen(self, low: Tensor, high: Tensor, valid: Tensor) -> None:
        """Extend the range to `low` and `high`, if `valid`; the first ones set it."""
        first = self.batches_observed == 0
        smallest = torch.where(first, low, torch.minimum(self.minimum, low))
        largest = torch.where(first, high, torch.maximum(self.maximum, high))
        self.minimum.copy_(torch.where(valid, smallest, self.minimum))
        self.maximum.copy_(torch.where(valid, largest, self.maximum))

    def _spans_ranks(self) -> bool:
        return self.synchronize and has_other_ranks()

    def _extremes_of_ranks(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (low, high, finite, skipped) of all ranks' tensors together.

        finite: whether there is a value and all are finite. skipped: whether one is not.
        """
        if input.numel() == 0:
            ends = torch.full_like(self.minimum, -torch.inf).reshape(-1).repeat(2)
            is_bad = torch.zeros_like(ends[:1])
        else:
            low, high = self._extremes(input)
            ends = torch.cat([-low.reshape(-1), high.reshape(-1)])
            is_bad = ends.isfinite().all().logical_not().reshape(1).to(ends.dtype)
        # A flag says what the ends cannot: the maximum of NaN and a number is undefined.
        reduced = maximum_of_ranks(torch.cat([ends, is_bad]))
        skipped = reduced[-1] > 0
        # Without any value the ends are infinite still.
        finite = reduced.isfinite().all() & skipped.logical_not()
        low, high = reduced[:-1].reshape(2, *self.minimum.shape).unbind()
        return -low, high, finite, skipped

    def _extremes(self, input: Tensor) -> tuple[Tensor, Tensor]:
        self._check_shape(input)
        return tensor_range(input, self._scheme)

    def _check_shape(self, input: Tensor) -> None:
        scheme, expected = self._scheme, tuple(self.minimum.shape)
        axis = scheme.axis
        fits = axis is None or -input.dim() <= axis < input.dim()
        if fits and range_shape(scheme, input.shape) == expected:
            return
        wanted = (
            f"scales of shape {expected}"
            if axis is None
            else f"{expected[0]} channels along axis {axis}"
        )
        raise QuantizationError(
            f"{self._site}: expected {wanted}, got a tensor of shape {tuple(input.shape)}."
        )
