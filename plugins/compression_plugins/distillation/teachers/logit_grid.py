"""The levels that a quantized teacher's logits can take, and how much they cut off."""

from __future__ import annotations

import torch
from torch import Tensor

from compression_manager.configuration.checks import require_integer, require_positive
from compression_manager.errors import ConfigError
from compression_manager.quantization import QuantizationScheme, choose_qparams
from compression_manager.quantization.arithmetic.ranges import tensor_range
from compression_manager.quantization.scheme import MAX_FLOAT32_BITS

OWNER = "QuantizedTeacher"

# Reciprocal, product and scale are each rounded to float32; without this room the largest logit
# of a range of 20 bits and more can still fall beyond its last integer.
_ROOM = 1 + 2**-22


def check_grid(scale: float, zero_point: int, scheme: QuantizationScheme) -> None:
    """Raise ConfigError unless scale and zero point give levels that are all float32 numbers."""
    require_positive(OWNER, "scale", scale)
    if scheme.symmetric and zero_point != 0:
        raise ConfigError(
            f"{OWNER}.zero_point must be 0 with symmetric=True, got {zero_point!r}; use "
            "symmetric=False."
        )
    require_integer(
        OWNER, "zero_point", zero_point, minimum=scheme.quant_min, maximum=scheme.quant_max
    )
    steps = max(scheme.quant_max - zero_point, zero_point - scheme.quant_min)
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= scale <= limits.max / steps:
        raise ConfigError(
            f"{OWNER}.scale must lie between {limits.tiny:g} and {limits.max / steps:g}, so that "
            f"every level of {scheme} is a float32, got {scale!r}."
        )


def finite_range(logits: Tensor, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest finite value (0 if there is none), both () float32.

    A mask of minus infinity leaves the range alone; values beyond float32 become its limits.
    """
    limit = torch.finfo(torch.float32).max
    low, high = tensor_range(logits.detach().nan_to_num(0.0, 0.0, 0.0), scheme)
    return low.clamp(-limit, limit), high.clamp(-limit, limit)


def can_read(logits: Tensor) -> bool:
    """Return whether the values may be read now: not while tracing, and not without values."""
    if torch.compiler.is_compiling() or type(logits) is not Tensor or logits.is_meta:
        return False
    return not (logits.is_cuda and torch.cuda.is_current_stream_capturing())


def clipped_fraction(
    logits: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme
) -> float:
    """Return the fraction of `logits` whose integer lies outside of the scheme's range.

    Infinities count as clipped, NaN does not. Waits for the logits' device.

    Args:
        logits: any shape, floating point; no value gives 0.
        scale: () float32.
        zero_point: () integer.
    """
    if logits.numel() == 0:
        return 0.0
    wide = scheme.bits > MAX_FLOAT32_BITS or logits.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    code = (logits.detach().to(dtype) * scale.reciprocal().to(dtype)).round() + zero_point
    clipped = (code < scheme.quant_min) | (code > scheme.quant_max)
    return int(clipped.sum()) / logits.numel()


def describe_clipping(fraction: float, logits: Tensor, scheme: QuantizationScheme) -> str:
    """Return the text of the warning: how much was clipped and what would hold these logits."""
    low, high = finite_range(logits, scheme)
    scale, zero_point = choose_qparams(low, high, scheme)
    fitting = f"scale={(scale * _ROOM).item():.9g}"
    if not scheme.symmetric:
        fitting += f", zero_point={int(zero_point)}"
    advice = f"{fitting} would hold them"
    if scheme.symmetric and scheme.bits == 1 and low < 0:
        advice = "one bit with symmetric=True leaves no negative level; use symmetric=False"
    if logits.isinf().any():
        advice += "; infinite logits, which no range holds, become its ends"
    return (
        f"{OWNER} clipped {fraction:.1%} of the {logits.numel()} logits of a batch, which "
        f"lie between {low.item():g} and {high.item():g}; {advice}. This is said once."
    )
