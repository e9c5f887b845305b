"""The observer that leaves out a fixed share of the outermost values."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.observers.binned import BinnedObserver
from compression_manager.quantization.observers.bins import fold
from compression_manager.quantization.observers.rows import Rows, as_rows
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite


class PercentileObserver(BinnedObserver):
    """The range that contains a percentage of all values.

    Symmetric schemes: plus and minus the percentile of the absolute values. Affine schemes: half
    of the rest is cut off at each end. This is the convention of onnxruntime's
    `PercentileCalibrater`. A percentile is that of `numpy.quantile` with its default method,
    linear interpolation.

    Activations: from a histogram, within the width of a bin of the percentile of all that was
    observed (affine schemes: half of it), and exact where it is an extreme value; a width is below
    2 / (bins - 1) of the observed range, with zero included. Weights: from the values themselves,
    exact.

    Args:
        percentile: percentage of the values to contain, above 0 and at most 100; taken to six
            digits.
        bins: bins per histogram, at least 128.

    Raises:
        QuantizationError: one of these is out of range.
    """

    def __init__(
        self,
        scheme: QuantizationScheme,
        site: QuantizationSite,
        percentile: float = 99.99,
        bins: int = 2048,
    ) -> None:
        super().__init__(scheme, site, bins)
        if not 0.0 < percentile <= 100.0:
            raise QuantizationError(
                f"{site}: a percentile is above 0 and at most 100, got {percentile!r}."
            )
        self.percentile = percentile
        outside = 1 - Fraction(str(percentile)) / 100
        cut = outside if scheme.symmetric else outside / 2
        # Positions are computed in int64: of up to 10^12 values without rounding.
        self._cut = cut.limit_denominator(10**6)

    def _range_of_counts(self) -> tuple[Tensor, Tensor]:
        counts, layout = self._rows_of_counts(), self._layout()
        width = layout.width()
        low, high = self.minimum.reshape(-1), self.maximum.reshape(-1)
        if self._scheme.symmetric:
            largest = torch.maximum(low.abs(), high.abs())
            magnitudes = fold(counts, layout).flip(1)
            nearest = torch.maximum(low, -high).clamp(min=0)
            end = self._cut_bins(magnitudes, width * self.bins, width, largest, nearest)
            return self._reshape(-end, end)
        bottom = layout.first * width
        top = (layout.first + self.bins) * width
        upper = self._cut_bins(counts.flip(1), top, width, high, low)
        lower = -self._cut_bins(counts, -bottom, width, -low, -high)
        return self._reshape(lower, upper)

    def compute_range(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return (minimum, maximum) of the percentile of `input` alone.

        float32, in the shape of the scales; NaN or infinity where a row holds any; zeros for an
        empty tensor.

        Raises:
            QuantizationError: the channel axis is missing or has another length.
        """
        minimum, maximum = self._extremes(input)
        if input.numel() == 0:
            return minimum, maximum
        rows = as_rows(input, self._scheme)
        if self._scheme.symmetric:
            high = self._cut_values(rows._replace(values=rows.values.abs()))
            low = -high
        else:
            high = self._cut_values(rows)
            low = -self._cut_values(rows._replace(values=-rows.values))
        low, high = self._reshape(low, high)
        finite = minimum.isfinite() & maximum.isfinite()
        return torch.where(finite, low, minimum), torch.where(finite, high, maximum)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "percentile": self.percentile}

    def _reshape(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low.reshape(self.minimum.shape), high.reshape(self.minimum.shape)

    def _position(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the place of the percentile, counted from the end, and the part beyond it."""
        scaled = self._cut.numerator * (lengths - 1).clamp(min=0)
        place = torch.div(scaled, self._cut.denominator, rounding_mode="floor")
        rest = scaled - place * self._cut.denominator
        return place, rest.to(torch.float32) / self._cut.denominator

    def _cut_bins(
        self, counts: Tensor, top: Tensor, width: Tensor, extreme: Tensor, end: Tensor
    ) -> Tensor:
        """Return the value below which the percentage lies, (rows,).

        Args:
            counts: (rows, bins), the largest values first.
            top: upper edge of the first bin.
            width: width of the bins.
            extreme: the largest value itself.
            end: no value is smaller.
        """
        place, rest = self._position(counts.sum(1))
        cumulative = counts.cumsum(1)

        def value_at(place: Tensor) -> Tensor:
            index = (cumulative <= place.unsqueeze(1)).sum(1)
            centre = torch.minimum(top - (index.to(torch.float32) + 0.5) * width, extreme)
            return torch.where(place == 0, extreme, torch.maximum(centre, end))

        return torch.lerp(value_at(place), value_at(place + (rest > 0)), rest)

    def _cut_values(self, rows: Rows) -> Tensor:
        """Return the value of each row below which the percentage lies, (rows,)."""
        values, is_value = rows.values, rows.is_value()
        if is_value is not None:
            values = values.masked_fill(~is_value, -torch.inf)
        longest = values.shape[1]
        deepest = self._cut.numerator * (longest - 1) // self._cut.denominator
        top = values.topk(min(deepest + 2, longest), dim=1).values
        place, rest = self._position(rows.lengths())
        near = top.gather(1, place.unsqueeze(1)).squeeze(1)
        beyond = top.gather(1, (place + (rest > 0)).unsqueeze(1)).squeeze(1)
        return torch.lerp(near, beyond, rest)
