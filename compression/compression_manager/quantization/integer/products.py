"""Products of integers with 32-bit sums, as real numbers, and sums with those of integers.

On a CPU with VNNI oneDNN's kernels compute them, through operators that torch keeps for
Inductor's own use, and in training, where a weight does not stay in oneDNN's order, native ones if
there are any. On other CPUs native kernels, or those of float32 with sums that are exact in it.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.cpu_features import cpu_features
from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.integer.operands import IntegerInput, IntegerWeight
from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.selection import TORCH
from compression_manager.quantization.tensors.memory_format import formatted_like

# What turns a signed code into an unsigned one, and back.
_OFFSET = 128
# oneDNN's scale, zero point and type of the output, and that nothing is done to it afterwards.
_FLOAT32_OUTPUT: tuple[object, ...] = (1.0, 0, torch.float32, "none", [], "")


_FUSED = "scales, zero point and bias fused"


def linear_kernel(device: torch.device, passes: Passes, *, packs: bool) -> str:
    """Return which kernel `linear` calls, and what it does beside the product.

    Args:
        device: of the operands.
        passes: as for `linear`.
        packs: as for `linear`.
    """
    if _takes_packed(device, packs):
        return f"onednn.qlinear_pointwise ({_FUSED})"
    return _multiplier(passes).integer_kernel(device)


def convolution_kernel(passes: Passes, groups: int, *, packs: bool) -> str:
    """Return which kernel `convolve` calls, and what it does beside the product.

    Args:
        passes: as for `convolve`.
        groups: of channels.
        packs: as for `convolve`.
    """
    chosen = _convolver(passes, groups)
    if _takes_onednn(chosen, packs):
        return f"onednn.qconv_pointwise ({_FUSED})"
    return chosen.integer_kernel(torch.device("cpu"))


def linear(
    input: IntegerInput,
    weight: IntegerWeight,
    bias: Tensor | None,
    passes: Passes,
    *,
    packs: bool,
) -> Tensor:
    """Return the product of the real numbers that the integers stand for, plus `bias`.

    Args:
        input: codes (*, in features).
        weight: codes (out features, in features).
        bias: float32 (out features,), or None.
        passes: what computes on the CPU.
        packs: whether it pays to bring the weight into oneDNN's order, because it is going to be
            multiplied again.

    Returns:
        float32 (*, out features).
    """
    _check_terms(input.codes.shape[-1], weight.codes.shape[1])
    codes, zero_point = _unsigned(input.codes.contiguous(), input.zero_point)
    if _takes_packed(codes.device, packs):
        return _packed_linear(codes, zero_point, input, weight, bias)
    scale = input.scale * weight.scale
    return _multiplier(passes).multiply_integers(codes, weight.codes, zero_point, scale, bias)


def add(input: Tensor, residual: IntegerInput, passes: Passes) -> Tensor:
    """Return `input` plus the real numbers that the integers stand for, on the CPU.

    Args:
        input: float32, dense, shape of the integers.
        residual: the integers.
        passes: what computes.
    """
    codes, scale, zero_point = residual.codes, float(residual.scale), int(residual.zero_point)
    if input.stride() == codes.stride():
        return passes.add_dequantized(input, codes, scale, zero_point)
    values = torch.empty_like(codes, dtype=torch.float32)
    return input + passes.dequantize(codes, scale, zero_point, values)


def convolve(
    input: IntegerInput,
    weight: IntegerWeight,
    bias: Tensor | None,
    geometry: Geometry,
    passes: Passes,
    *,
    packs: bool,
) -> Tensor:
    """Return the convolution of the real numbers that the integers stand for, on the CPU.

    Args:
        input: codes (N, C, *spatial), of one to three spatial dimensions.
        weight: codes (out channels, C / groups, *kernel).
        bias: float32 (out channels,), or None.
        geometry: zero padding is that of real zeros.
        passes: what computes on the CPU.
        packs: as for `linear`.

    Returns:
        float32 (N, out channels, *spatial'), in the memory format of the input.
    """
    _check_terms(input.codes.shape[1], weight.codes.shape[1] * geometry.groups)
    chosen = _convolver(passes, geometry.groups)
    if _takes_onednn(chosen, packs):
        return _onednn_convolve(input, weight, bias, geometry, packs=packs)
    codes, zero_point = _unsigned(input.codes, input.zero_point)
    scale = input.scale * weight.scale
    return chosen.convolve_integers(codes, weight.codes, int(zero_point), scale, bias, geometry)


def _check_terms(found: int, expected: int) -> None:
    if found != expected:
        raise QuantizationError(f"the layer takes {expected} features or channels, got {found}.")


def _takes_packed(device: torch.device, packs: bool) -> bool:
    return packs and device.type == "cpu" and cpu_features().vnni


def _convolver(passes: Passes, groups: int) -> Passes:
    """Return whose kernels convolve in training."""
    return _multiplier(passes) if groups == 1 else TORCH


def _multiplier(passes: Passes) -> Passes:
    return passes if passes.supports_integers() else TORCH


def _takes_onednn(chosen: Passes, packs: bool) -> bool:
    """Return whether oneDNN convolves: for later calls, or for want of others."""
    return cpu_features().vnni and (packs or chosen is TORCH)


def _unsigned(codes: Tensor, zero_point: Tensor) -> tuple[Tensor, int | Tensor]:
    """Return codes from 0 to 255, and their zero point; a tensor on an accelerator."""
    number = int(zero_point) if zero_point.device.type == "cpu" else zero_point
    if codes.dtype == torch.uint8:
        return codes, number
    return codes.view(torch.uint8) ^ _OFFSET, number + _OFFSET


@lru_cache
def _zeros(columns: int) -> Tensor:
    """Return the zero points of a weight, which has none."""
    with torch.device("cpu"), torch.inference_mode(False):
        return torch.zeros(columns, dtype=torch.int32)


@cache
def _any_scale() -> Tensor:
    with torch.device("cpu"), torch.inference_mode(False):
        return torch.ones(())


def _packed_linear(
    codes: Tensor,
    zero_point: int | Tensor,
    input: IntegerInput,
    weight: IntegerWeight,
    bias: Tensor | None,
) -> Tensor:
    if weight.packed is None:
        weight.packed = torch.ops.onednn.qlinear_prepack(weight.codes, None)
    output: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes.view(codes.shape[:-1].numel(), codes.shape[-1]),
        float(input.scale),
        zero_point,
        weight.packed,
        weight.scale,
        _zeros(len(weight.scale)),
        bias,
        *_FLOAT32_OUTPUT,
    )
    return output.view(*codes.shape[:-1], len(weight.scale))


def _onednn_convolve(
    input: IntegerInput,
    weight: IntegerWeight,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    packs: bool,
) -> Tensor:
    codes, zero_point = _unsigned(input.codes, input.zero_point)
    packed = weight.packed
    if packed is None:
        # An order for inputs of any size is kept; the one for this size is the fastest. No order
        # depends on the scales, which torch would read one by one.
        packed = torch.ops.onednn.qconv_prepack(
            weight.codes,
            _any_scale(),
            float(input.scale),
            zero_point,
            *geometry,
            None if packs else list(codes.shape),
        )
        weight.packed = packed if packs else None
    output: Tensor = torch.ops.onednn.qconv_pointwise(
        codes,
        float(input.scale),
        zero_point,
        packed,
        weight.scale,
        _zeros(len(weight.scale)),
        bias,
        *geometry,
        *_FLOAT32_OUTPUT,
    )
    return formatted_like(output, input.codes)
