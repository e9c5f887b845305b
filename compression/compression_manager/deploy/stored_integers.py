"""Whether a converted model stores the very integers that training computed with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.replacement import Replacement
from compression_manager.errors import ParityError
from compression_manager.quantization.arithmetic.rounding import quantize
from compression_manager.quantization.layers import Part, QuantizedLayer


@torch.no_grad()
def check_integers(trained: nn.Module, replacements: Sequence[Replacement]) -> None:
    """Compare the integers of each replaced layer with those of the layer that was trained.

    A layer that absorbed a BatchNorm has the negative of all integers of a channel whose factor
    is negative, and zeros where that is zero.

    Raises:
        ParityError: naming the first layer that stores others.
    """
    for replacement in replacements:
        layer = trained.get_submodule(replacement.name)
        if not isinstance(layer, QuantizedLayer):
            continue  # a plugin replaced a layer that it does not train
        for name, part in layer.parts().items():
            if part.weight is None or part.weight_quantizer is None:
                continue
            expected = _integers(part)
            stored = cast(ConvertedLayer, replacement.layer.get_submodule(name)).integer_weight()
            differing = _count_differing(expected, stored, may_be_scaled=bool(replacement.absorbed))
            if differing:
                where = f"'{replacement.name}'" + (f" ('{name}')" if name else "")
                raise ParityError(
                    f"layer {where} stores other integers than it was trained with: {differing} of "
                    f"{expected.numel()} of its weight's differ."
                )


def _integers(part: Part) -> Tensor:
    assert part.weight is not None
    assert part.weight_quantizer is not None
    scheme, weight = part.weight_quantizer.scheme, part.weight.detach()
    numbers = part.weight_quantizer.quantization_parameters(weight)
    return quantize(
        weight,
        numbers.scale,
        numbers.zero_point,
        scheme.quant_min,
        scheme.quant_max,
        scheme.axis,
        group_size=scheme.group_size,
    )


def _count_differing(expected: Tensor, stored: Tensor, *, may_be_scaled: bool) -> int:
    wanted, found = expected.flatten(1), stored.flatten(1)
    differing = (wanted != found).sum(1)
    if may_be_scaled:  # then symmetric and signed, so that each integer has its negative
        differing = torch.minimum(differing, (wanted != -found).sum(1))
        differing = differing.masked_fill((found == 0).all(1), 0)
    return int(differing.sum())
