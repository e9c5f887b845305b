"""Where in a model a tensor is quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic.ranges import range_shape
from compression_manager.quantization.scheme import QuantizationScheme

Role = Literal["weight", "activation"]


@dataclass(frozen=True, slots=True)
class QuantizationSite:
    """One tensor of one layer.

    Attributes:
        layer: qualified name of the layer, for example `encoder.layers.0.linear1`.
        role: the layer's weight, or its input activation.
        channels: length of the scheme's channel axis, or None when granularity is per tensor.
        device: where the buffers of the observer and fake quantizer live.
        shape: shape of the tensor, if it is known before training (a weight's is).
    """

    layer: str
    role: Role
    channels: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shape: tuple[int, ...] | None = None

    def range_shape(self, scheme: QuantizationScheme) -> tuple[int, ...]:
        """Return the shape of this tensor's ranges and scales: (), (channels,), (rows, groups).

        Raises:
            QuantizationError: the number of channels, or the shape, is unknown.
        """
        if scheme.granularity == "channel" and self.channels is not None:
            return (self.channels,)
        if scheme.granularity == "tensor" or self.shape is not None:
            return range_shape(scheme, self.shape or ())
        needed = "number of channels" if scheme.granularity == "channel" else "tensor's shape"
        raise QuantizationError(f"{self}: {scheme} needs the {needed}.")

    def __str__(self) -> str:
        return f"{self.role} of layer '{self.layer}'"
