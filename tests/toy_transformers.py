"""`Conv1D` of transformers, which need not be installed; found under its qualified name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Conv1D(nn.Module):
    """y = x @ weight + bias, weight (inputs, outputs), as GPT-2 has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.nx = inputs
        self.weight = nn.Parameter(torch.empty(inputs, outputs).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(shape)


_Conv1D.__module__ = "transformers.pytorch_utils"
_Conv1D.__name__ = _Conv1D.__qualname__ = "Conv1D"
Conv1D = _Conv1D
