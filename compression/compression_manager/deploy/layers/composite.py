"""Deployed layers that are made of several parts, each with integers of its own."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.deploy.layers.linear import ConvertedLinear
from compression_manager.quantization.layers.base import Operand


class ConvertedComposite(ConvertedLayer):
    """A deployed layer whose parts are children: `ConvertedLinear`, by the name of the part.

    It has no weight, scale, zero point or bias of its own.
    """

    def __init__(self, spec: LayerSpec, operands: dict[str, Operand]) -> None:
        nn.Module.__init__(self)
        self.spec = spec
        for name, operand in operands.items():
            part = replace(spec, kind="Linear", bias=operand.bias is not None)
            self.add_module(name, ConvertedLinear(_FloatPart(operand), part))
        self.train(False)


class _FloatPart(nn.Module):
    """A matrix of a float layer, as the `nn.Linear` that it is.

    Attributes:
        weight: (out_features, in_features).
        bias: (out_features,), or None.
    """

    __constants__ = ("in_features", "out_features")

    def __init__(self, operand: Operand) -> None:
        super().__init__()
        assert operand.weight is not None
        self.weight: Tensor = operand.weight.detach()
        self.bias = None if operand.bias is None else operand.bias.detach()
        self.out_features, self.in_features = operand.weight.shape
