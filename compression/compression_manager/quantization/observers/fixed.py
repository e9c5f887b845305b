"""An observer of a range that is known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.observer import Observer
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite


class FixedRangeObserver(Observer):
    """Answers one range, whatever it sees; values outside of it are clipped.

    Attributes:
        minimum, maximum: float32, in the shape of the scales.
    """

    minimum: Tensor
    maximum: Tensor

    def __init__(
        self, scheme: QuantizationScheme, site: QuantizationSite, minimum: float, maximum: float
    ) -> None:
        super().__init__()
        self._site = site
        shape = site.range_shape(scheme)
        for name, value in (("minimum", minimum), ("maximum", maximum)):
            self.register_buffer(
                name, torch.full(shape, value, dtype=torch.float32, device=site.device)
            )

    def observe(self, input: Tensor) -> None:
        """Do nothing."""

    def compute_range(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fixed range."""
        return self.minimum, self.maximum

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Return the fixed range."""
        return self.minimum, self.maximum

    def has_observed(self) -> bool:
        """Return True: there is a range from the beginning."""
        return True

    def merge(self, other: Observer) -> None:
        """Do nothing, after checking that `other` has the same range.

        Raises:
            QuantizationError: it has another one, or is of another kind.
        """
        if not isinstance(other, FixedRangeObserver):
            raise QuantizationError(
                f"{self._site}: a FixedRangeObserver merges with its own kind only, got a "
                f"{type(other).__name__}."
            )
        ends = ((self.minimum, other.minimum), (self.maximum, other.maximum))
        if not all(torch.equal(own, its.to(own.device)) for own, its in ends):
            raise QuantizationError(
                f"{self._site}: cannot merge observers of different ranges: {self._described()} "
                f"here, {other._described()} in the other."
            )

    def _described(self) -> str:
        low, high = self.minimum.reshape(-1)[:1].tolist(), self.maximum.reshape(-1)[:1].tolist()
        return f"{low + high} for scales of shape {tuple(self.minimum.shape)}"
