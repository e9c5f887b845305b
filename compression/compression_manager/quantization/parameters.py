"""From a range of real numbers to a scale and a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.scheme import MAX_FLOAT32_BITS, QuantizationScheme

# torch's observers use the same lower limit, so that a range of zero has an inverse scale.
MIN_SCALE = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class QuantizationParameters:
    """All numbers that map a tensor to integers and back.

    Attributes:
        scale: float32, () per tensor or (channels,) per channel, positive.
        zero_point: int32 (int64 above 24 bits), shape of `scale`: the integer of real zero.
        quant_min: smallest integer.
        quant_max: largest integer.
        axis: channel axis of the tensor, or None per tensor.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None


def choose_qparams(
    minimum: Tensor, maximum: Tensor, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point that map a range onto the integers of `scheme`.

    Symmetric: scale = max(|minimum|, |maximum|) / quant_max, with zero point 0 (unsigned: the
    middle of the range). Affine: the range is widened to contain 0, scale = (maximum -
    minimum) / (quant_max - quant_min), zero_point = quant_min - round(minimum / scale). Both
    as in torch's `UniformQuantizationObserverBase`, in float32 (float64 above 24 bits).

    Args:
        minimum: smallest values, () or (channels,), floating point.
        maximum: largest values, same shape and device.

    Returns:
        scale: float32, shape of `minimum`, at least float32's epsilon.
        zero_point: int32, int64 above 24 bits, shape of `minimum`.

    Raises:
        QuantizationError: shapes differ; or the range is not finite or is reversed, which is
            checked only on the CPU and outside of torch.compile, because reading the values
            would make an accelerator wait.
    """
    if minimum.shape != maximum.shape or minimum.dim() > 1:
        raise QuantizationError(
            f"minimum and maximum have shapes {tuple(minimum.shape)} and {tuple(maximum.shape)}; "
            "both must be () for one range per tensor or (channels,) for one per channel."
        )
    if minimum.device.type == "cpu" and not torch.compiler.is_compiling():
        check_range(minimum, maximum)
    return compute_qparams(minimum, maximum, scheme)


def compute_qparams(
    minimum: Tensor, maximum: Tensor, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    """Return what `choose_qparams` does, without looking at the values (for training steps)."""
    wide = scheme.bits > MAX_FLOAT32_BITS
    dtype = torch.float64 if wide else torch.float32
    index_dtype = torch.int64 if wide else torch.int32
    # Zero is inside of every range, or padding and ReLU's zeros would not be exact.
    low = minimum.detach().to(dtype).clamp(max=0.0)
    high = maximum.detach().to(dtype).clamp(min=0.0)
    if scheme.symmetric:
        steps = scheme.quant_max - scheme.symmetric_zero_point
        scale = _divide(torch.maximum(-low, high), steps)
        return scale, torch.full_like(scale, scheme.symmetric_zero_point, dtype=index_dtype)
    extent = (high - low).clamp(max=torch.finfo(torch.float32).max)
    scale = _divide(extent, scheme.quant_max - scheme.quant_min)
    zero_point = scheme.quant_min - torch.round(low / scale)
    return scale, zero_point.clamp(scheme.quant_min, scheme.quant_max).to(index_dtype)


def _divide(extent: Tensor, steps: int) -> Tensor:
    # CUDA multiplies by the reciprocal of a Python number; a tensor divides on every device.
    scale = (extent / extent.new_full((), steps)).to(torch.float32)
    return scale.clamp(min=MIN_SCALE)


def check_range(minimum: Tensor, maximum: Tensor, *, where: str = "a range") -> None:
    """Raise QuantizationError unless all values are finite and minimum <= maximum.

    Reads the values, so that an accelerator has to finish its work first.

    Args:
        where: what the range belongs to, for the message.
    """
    ordered = (minimum <= maximum) & minimum.isfinite() & maximum.isfinite()
    if bool(ordered.all()):
        return
    low, high = minimum.reshape(-1), maximum.reshape(-1)
    channel = int(ordered.reshape(-1).logical_not().nonzero()[0])
    place = f" in channel {channel}" if minimum.dim() else ""
    raise QuantizationError(
        f"{where} from {low[channel].item():g} to {high[channel].item():g}{place} cannot be "
        "quantized; both ends must be finite and the minimum at most the maximum."
    )
