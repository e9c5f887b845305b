"""Which arithmetic a layer computes with: a rule on its operands, its size and the machine."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from compression_manager.quantization.integer.cpu_features import cpu_features
from compression_manager.quantization.integer.geometry import Size
from compression_manager.quantization.integer.options import PIECES, Backward, ProductOptions
from compression_manager.quantization.integer.passes import MAX_SUMMED, Passes
from compression_manager.quantization.integer.selection import why_reference

Path = Literal["integer", "codes", "fake"]

# Below, in training, what surrounds an integer product costs more than the product saves:
# multiplications, with native kernels and with plain torch operations,
MIN_NATIVE_WORK = 2**20
MIN_WORK = 2**24
# terms of a sum, and columns.
MIN_SUMMED = 64
MIN_COLUMNS = 16

# What CUDA's product of 8-bit matrices takes.
_CUDA_MULTIPLE = 8
_CUDA_MIN_ROWS = 17


class Decision(NamedTuple):
    """The path that a product takes, and why it is not a faster one.

    Attributes:
        path: "integer": products of integers. "codes": float32 products, between which only the
            integers are kept. "fake": the functions of `arithmetic`.
        reason: why not integers; empty for them.
    """

    path: Path
    reason: str = ""


def decide(
    options: ProductOptions,
    input: Tensor,
    weight: Tensor | None,
    size: Size,
    passes: Passes,
    *,
    training: bool,
) -> Decision:
    """Return the path of a product whose operands have integers.

    A rule on shapes, dtypes, the machine and whether it has the native kernels, so that equal runs
    compute equally.

    Args:
        options: what the user chose.
        input: the input of the layer.
        weight: its float weight; None in a deployed layer, which has none.
        size: of the product.
        passes: what multiplies in training.
        training: the mode of the layer. Not whether gradients are wanted, because activation
            checkpointing may run a forward pass without them first.
    """
    reason = why_no_codes(options, *((input,) if weight is None else (input, weight)))
    if reason is not None:
        return Decision("fake", reason)
    reason = why_no_integers(options, input.device, size, passes, training)
    if reason is None:
        return Decision("integer")
    # On an accelerator the passes around float32 products are many small kernels.
    return Decision("codes" if input.is_cpu else "fake", reason)


def why_no_codes(options: ProductOptions, *operands: Tensor) -> str | None:
    """Return why no integers of floats are made, whatever their schemes; None if they are.

    Args:
        options: what the user chose.
        operands: the floats; the first is quantized.
    """
    if options.forward == "fake":
        return 'forward="fake"'
    reason = why_reference()
    if reason is not None:
        return reason
    for operand in operands:
        if type(operand) not in (Tensor, Parameter):
            return f"it computes on {type(operand).__name__}"
        if operand.dtype != torch.float32:
            return f"it computes in {operand.dtype}"
    input = operands[0]
    device = "cpu" if input.is_cpu else input.device.type
    if device not in ("cpu", "cuda"):
        return f"it computes on {device}"
    if torch.is_autocast_enabled(device):
        return "autocast chooses the type of the products"
    return "its input is empty" if input.numel() == 0 else None


def why_no_integers(
    options: ProductOptions, device: torch.device, size: Size, passes: Passes, training: bool
) -> str | None:
    """Return why a product is not computed on integers; None if it is.

    Args:
        options: what the user chose.
        device: the CPU or a CUDA device.
        size: of the product.
        passes: what multiplies in training.
        training: whether the layer is trained. In evaluation weights stay as they are, so that
            integers pay at any size; where they do not, float32 kernels sum them as exactly, so
            that a model computes the same in every process.
    """
    if size.summed > MAX_SUMMED:
        return f"32-bit sums hold {MAX_SUMMED} products, not {size.summed}"
    if device.type == "cuda":
        return _why_not_on_cuda(options, size)
    if options.forward == "integer":
        return None
    if size.groups > 1:
        return f"{size.groups} groups of channels leave little to multiply"
    if not training:
        return None
    is_native = passes.supports_integers()
    if not is_native and not cpu_features().vnni:
        return f"the {passes.name} kernels need VNNI to gain; this CPU has {cpu_features()}"
    return _why_too_small(size, MIN_NATIVE_WORK if is_native else MIN_WORK)


@lru_cache
def _why_too_small(size: Size, least_work: int) -> str | None:
    for name, value, least in (
        ("multiplications", size.rows * size.summed * size.columns, least_work),
        ("products in a sum", size.summed, MIN_SUMMED),
        ("output channels", size.columns, MIN_COLUMNS),
    ):
        if value < least:
            return f"{value:,} {name} are too few to gain; {least:,} are needed"
    return None


def _why_not_on_cuda(options: ProductOptions, size: Size) -> str | None:
    if options.forward == "auto":
        return 'on CUDA integers are multiplied with forward="integer" only'
    if size.rows < _CUDA_MIN_ROWS:
        return f"CUDA multiplies {_CUDA_MIN_ROWS} rows or more"
    if size.summed % _CUDA_MULTIPLE or size.columns % _CUDA_MULTIPLE:
        return f"CUDA multiplies matrices whose sides are multiples of {_CUDA_MULTIPLE}"
    return None


def backward_of(options: ProductOptions, device: torch.device, passes: Passes) -> Backward:
    """Return how gradients are multiplied: as chosen, where the machine does it fast."""
    chosen = options.backward
    if chosen == "float32" or device.type != "cpu":
        return "float32"
    features = cpu_features()
    if not (features.amx or features.bfloat16):
        return "float32"
    return chosen if passes.supports_pieces(PIECES[chosen]) else "float32"
