"""From a range of real numbers to a scale and a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.scheme import MAX_FLOAT32_BITS, QuantizationScheme

# torch's observers use the same lower limit, so that a range of zero has an inverse scale.
MIN_SCALE = torch.finfo(torch.float32).eps
# Above 24 bits it would cut off the digits that the bits are for; this one has an inverse too.
MIN_WIDE_SCALE = torch.finfo(torch.float32).tiny

# What the outermost integers may stand for: float32's maximum, less what rounding the scale and
# its product with an integer can add.
MAX_LEVEL = torch.finfo(torch.float32).max * (1 - 2**-22)


@dataclass(frozen=True, eq=False)
class QuantizationParameters:
    """All numbers that map a tensor to integers and back.

    Attributes:
        scale: float32, positive: () per tensor, (channels,) per channel, (rows, groups) per
            group.
        zero_point: int32 (int64 above 24 bits), shape of `scale`: the integer of real zero.
        quant_min: smallest integer.
        quant_max: largest integer.
        axis: channel axis of the tensor, or None.
        group_size: values that share a scale, or None.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None
    group_size: int | None = None

    def real_range(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest number that an integer stands for, over all scales.

        Returns:
            Both float64 (), on the device of `scale`.
        """
        scale, zero_point = self.scale.detach().double(), self.zero_point.double()
        low = ((self.quant_min - zero_point) * scale).min()
        return low, ((self.quant_max - zero_point) * scale).max()


def choose_qparams(
    minimum: Tensor | float, maximum: Tensor | float, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point that map a range onto the integers of `scheme`.

    Symmetric: scale = max(|minimum|, |maximum|) / ((quant_max - quant_min) / 2), which in a
    narrow range is quant_max, with zero point 0 (unsigned: the middle of the range); with one
    bit the scale is max(|minimum|, |maximum|). Affine: the range is widened to contain 0, scale =
    (maximum - minimum) / (quant_max - quant_min), zero_point = quant_min - round(minimum /
    scale). All as in torch's `UniformQuantizationObserverBase`, in float32 (float64 above 24
    bits).

    Every integer stands for a finite float32: where the outermost one would exceed its maximum,
    the scale is the largest with which it does not. The range is then cut by at most one step.

    Args:
        minimum: smallest values, floating point; any shape, for example (channels,), or a
            number.
        maximum: largest values, same shape and device.

    Returns:
        scale: float32, shape of `minimum`, at least float32's epsilon (above 24 bits: its
            smallest normal number).
        zero_point: int32, int64 above 24 bits, shape of `minimum`.

    Raises:
        QuantizationError: shapes differ; or the range is not finite or is reversed, which is
            checked only on the CPU and outside of torch.compile, because reading the values
            would make an accelerator wait.
    """
    minimum, maximum = (
        limit if isinstance(limit, Tensor) else torch.tensor(limit, dtype=torch.float64)
        for limit in (minimum, maximum)
    )
    if minimum.shape != maximum.shape:
        raise QuantizationError(
            f"minimum and maximum have shapes {tuple(minimum.shape)} and {tuple(maximum.shape)}; "
            "both must have the shape of the scales."
        )
    if minimum.device.type == "cpu" and not torch.compiler.is_compiling():
        check_range(minimum, maximum)
    return compute_qparams(minimum, maximum, scheme)


def compute_qparams(
    minimum: Tensor, maximum: Tensor, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    """Return what `choose_qparams` does, without looking at the values (for training steps).

    The scale of a range that is not finite is not a number.
    """
    dtype = torch.float64 if scheme.bits > MAX_FLOAT32_BITS else torch.float32
    index_dtype = zero_point_dtype(scheme)
    # Zero is inside of every range, or padding and ReLU's zeros would not be exact.
    low = minimum.detach().to(dtype).clamp(max=0.0)
    high = maximum.detach().to(dtype).clamp(min=0.0)
    if scheme.symmetric:
        scale = symmetric_scale(torch.maximum(-low, high), scheme)
        return scale, torch.full_like(scale, scheme.symmetric_zero_point, dtype=index_dtype)
    # Their signs differ, so that this is zero for every finite range, and otherwise not a number.
    nothing = (low + high) * 0.0
    # Halves, because the extent may exceed float32; the quotient is the same to the last bit.
    half_extent = high * 0.5 - low * 0.5 + nothing
    scale = _divide(half_extent, (scheme.quant_max - scheme.quant_min) / 2, scheme)
    zero_point = scheme.quant_min - torch.round(low / scale)
    zero_point = zero_point.clamp(scheme.quant_min, scheme.quant_max)
    # Rounding the zero point moves one end of the range outwards, by up to half a step.
    farthest = torch.maximum(scheme.quant_max - zero_point, zero_point - scheme.quant_min)
    scale = torch.minimum(scale, (MAX_LEVEL / farthest).to(torch.float32))
    return scale, zero_point.to(index_dtype)


def symmetric_scale(largest: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Return the scale of `compute_qparams` from the largest distance of each range from zero."""
    # What is added is zero for every finite number, and otherwise not a number.
    scale = _divide(largest + largest * 0.0, _symmetric_steps(scheme), scheme)
    return scale.clamp(max=MAX_LEVEL / _farthest_symmetric_level(scheme))


def zero_point_dtype(scheme: QuantizationScheme) -> torch.dtype:
    """Return int32, or int64 above 24 bits."""
    return torch.int64 if scheme.bits > MAX_FLOAT32_BITS else torch.int32


def _symmetric_steps(scheme: QuantizationScheme) -> float:
    """Return by how many steps the end of a symmetric range is away from zero."""
    return max((scheme.quant_max - scheme.quant_min) / 2, 1)


def _farthest_symmetric_level(scheme: QuantizationScheme) -> int:
    """Return by how many steps the outermost integer is away from zero."""
    zero_point = scheme.symmetric_zero_point
    return max(scheme.quant_max - zero_point, zero_point - scheme.quant_min)


def _divide(extent: Tensor, steps: float, scheme: QuantizationScheme) -> Tensor:
    # CUDA multiplies by the reciprocal of a Python number; a tensor divides on every device.
    scale = (extent / extent.new_full((), steps)).to(torch.float32)
    return scale.clamp(min=MIN_WIDE_SCALE if scheme.bits > MAX_FLOAT32_BITS else MIN_SCALE)


def check_range(minimum: Tensor, maximum: Tensor, *, where: str = "a range") -> None:
    """Raise QuantizationError unless all values are finite and minimum <= maximum.

    Reads the values, so that an accelerator has to finish its work first.

    Args:
        where: what the range belongs to, for the message.
    """
    ordered = (minimum <= maximum) & minimum.isfinite() & maximum.isfinite()
    if bool(ordered.all()):
        return
    first = tuple(ordered.logical_not().nonzero()[0].tolist())
    place = {0: "", 1: f" in channel {first[0] if first else 0}"}.get(
        minimum.dim(), f" at {list(first)} of the scales"
    )
    raise QuantizationError(
        f"{where} from {minimum[first].item():g} to {maximum[first].item():g}{place} cannot be "
        "quantized; both ends must be finite and the minimum at most the maximum."
    )
