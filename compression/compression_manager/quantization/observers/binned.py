"""The base of observers that keep a histogram of everything they saw."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.observers.base import RangeObserver
from compression_manager.quantization.observers.bins import Layout, make_layout, rebin, tally
from compression_manager.quantization.observers.rows import as_rows
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite
from compression_manager.ranks import sum_of_ranks

MIN_BINS = 128


class BinnedObserver(RangeObserver):
    """Keeps a histogram for each scale: bounded memory, whatever is observed.

    The bins start as fine as the first batch allows and are merged pairwise when later ones
    exceed them, so that every count stays exact; batches may come in any order and merging
    observers gives exactly the state of one that saw everything. Memory: 8 bytes per bin and scale.

    A weight's site keeps no histogram, because the range of a weight is a function of its
    present value (`compute_range`).

    Args:
        bins: bins per histogram, at least 128.

    Attributes:
        counts: int64, (*shape of the scales, bins); activations only.

    Raises:
        QuantizationError: too few bins.
    """

    counts: Tensor

    def __init__(self, scheme: QuantizationScheme, site: QuantizationSite, bins: int) -> None:
        super().__init__(scheme, site)
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < MIN_BINS:
            raise QuantizationError(
                f"{site}: bins of a {type(self).__name__} is an integer of at least {MIN_BINS}, "
                f"got {bins!r}."
            )
        self.bins = bins
        if site.role != "weight":
            shape = (*self.minimum.shape, bins)
            counts = torch.zeros(shape, dtype=torch.int64, device=site.device)
            self.register_buffer("counts", counts)

    def observe(self, input: Tensor) -> None:
        """Count the values of the batch `input`.

        Raises:
            QuantizationError: the site is a weight; or the channel axis is missing or has
                another length.
        """
        if self._site.role == "weight":
            raise QuantizationError(
                f"{self._site}: a {type(self).__name__} computes the range of a weight from its "
                "present value (compute_range) and observes activations only."
            )
        super().observe(input)

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Return the (minimum, maximum) that the class describes, of all finite batches.

        Zeros before the first, and for a weight's site.
        """
        if self._site.role == "weight":
            return super().observed_range()
        return self._range_of_counts()

    @abstractmethod
    def _range_of_counts(self) -> tuple[Tensor, Tensor]:
        """Return what `observed_range` does, for an activation."""

    def _take(self, input: Tensor, low: Tensor, high: Tensor, finite: Tensor) -> None:
        before = self._layout()
        self._widen(low, high, finite)
        after = self._layout()
        counts = rebin(self._rows_of_counts(), before, after)
        added = torch.zeros_like(counts)
        if input.numel() > 0:
            tally(added, as_rows(input, self._scheme), after, finite)
        counts += sum_of_ranks(added) if self._spans_ranks() else added
        self.counts.copy_(counts.reshape(self.counts.shape))

    def _merge(self, other: Self) -> None:
        if self._site.role == "weight":
            return
        device = self.minimum.device
        mine, theirs = self._layout(), other._layout()
        added = other._rows_of_counts().to(device)
        theirs = Layout(theirs.exponent.to(device), theirs.first.to(device))
        low, high = other.minimum.to(device), other.maximum.to(device)
        self._widen(low, high, other.batches_observed.to(device) > 0)
        after = self._layout()
        counts = rebin(self._rows_of_counts(), mine, after) + rebin(added, theirs, after)
        self.counts.copy_(counts.reshape(self.counts.shape))

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "bins": self.bins}

    def _layout(self) -> Layout:
        return make_layout(self.minimum.reshape(-1), self.maximum.reshape(-1), self.bins)

    def _rows_of_counts(self) -> Tensor:
        return self.counts.reshape(-1, self.bins)
