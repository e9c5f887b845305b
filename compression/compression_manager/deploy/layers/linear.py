"""Deployed `nn.Linear`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from compression_manager.deploy.layers import products
from compression_manager.deploy.layers.base import ConvertedLayer


class ConvertedLinear(ConvertedLayer):
    """Deployed `nn.Linear`; input (*, in_features)."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (*, out_features)."""
        self.check_input(input)
        output = products.linear(self, input)
        if output is not None:
            return output
        return F.linear(self.quantized_input(input), self.float_weight(input.dtype), self.bias)
