"""Where in a model a tensor is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

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
    device: torch.device = torch.device("cpu")
