"""Where in a model a tensor is quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from compression_manager.errors import QuantizationError
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
    """

    layer: str
    role: Role
    channels: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def range_shape(self, scheme: QuantizationScheme) -> tuple[int, ...]:
        """Return the shape of this tensor's ranges and scales: () or (channels,).

        Raises:
            QuantizationError: `scheme` is per channel and the number of channels is unknown.
        """
        if scheme.granularity == "tensor":
            return ()
        if self.channels is None:
            raise QuantizationError(
                f"{self}: {scheme} needs the number of channels along axis {scheme.axis}."
            )
        return (self.channels,)

    def __str__(self) -> str:
        return f"{self.role} of layer '{self.layer}'"
