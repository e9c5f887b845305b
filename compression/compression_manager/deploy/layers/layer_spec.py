"""What must be known of a deployed layer besides its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.operands import (
    why_no_integer_input,
    why_no_integer_weight,
)
from compression_manager.quantization.integer.options import FORWARD, Forward, ProductOptions
from compression_manager.quantization.scheme import QuantizationScheme


@dataclass(frozen=True)
class LayerSpec:
    """What must be known of a deployed layer besides its tensors; JSON-able.

    Attributes:
        kind: class name of the float layer, for example `Linear`.
        weight: scheme of all its weights, or None if it has none.
        input: scheme of all its inputs, or None if they stay in floating point.
        bias: whether the deployed layer adds a bias (folding BatchNorm creates one).
        forward: how a linear layer, convolution or sum computes.
    """

    kind: str
    weight: QuantizationScheme | None
    input: QuantizationScheme | None
    bias: bool
    forward: Forward = "auto"

    @cached_property
    def product_options(self) -> ProductOptions:
        """What `forward` means for the rule on products; inference has no gradients."""
        return ProductOptions(self.forward)

    @cached_property
    def has_integer_factors(self) -> bool:
        """Whether both schemes are such that integers can be multiplied."""
        return (
            self.weight is not None
            and self.input is not None
            and why_no_integer_weight(self.weight) is None
            and why_no_integer_input(self.input) is None
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `from_dict` takes them back."""
        return {
            **asdict(self),
            "weight": None if self.weight is None else self.weight.to_dict(),
            "input": None if self.input is None else self.input.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerSpec:
        """Return the spec that `to_dict` described.

        Raises:
            QuantizationError: a scheme or `forward` that there is not.
        """
        # Files of releases that did not write it down were loaded as this.
        forward = values.get("forward", "auto")
        if forward not in FORWARD:
            raise QuantizationError(f"forward has to be one of {FORWARD}, is {forward!r}.")
        return cls(
            kind=values["kind"],
            weight=_scheme_or_none(values["weight"]),
            input=_scheme_or_none(values["input"]),
            bias=values["bias"],
            forward=forward,
        )


def _scheme_or_none(values: dict[str, Any] | None) -> QuantizationScheme | None:
    return None if values is None else QuantizationScheme.from_dict(values)
