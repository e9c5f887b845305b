"""The gradients of convolutions by the C++ functions."""

from __future__ import annotations

import torch
from torch import Tensor

from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.integer.native.checks import (
    check_gradient,
    check_vector,
    check_zero_point,
)
from compression_manager.quantization.integer.native.integers import (
    NativeIntegers,
    numbers_of,
    require_none,
)
from compression_manager.quantization.tensors.memory_format import strided_copy


class NativeGradients(NativeIntegers):
    """These gradients, beside the products of integers."""

    def supports_convolution_gradients(self) -> bool:
        """Return whether there are instructions by which these gradients are the fastest: AMX."""
        return bool(self._functions.has_convolution_gradients())

    def convolution_input_gradient(
        self, gradient: Tensor, weight: Tensor, scale: Tensor, codes: Tensor, geometry: Geometry
    ) -> Tensor:
        """See `Passes.convolution_input_gradient`; it needs AVX-512 BF16 at least."""
        check_gradient(gradient, codes, weight, geometry)
        check_vector("scale", scale, weight.shape[0])
        values, matrix = _with_channels_last(gradient), _with_channels_last(weight)
        output = torch.empty_like(codes, dtype=torch.float32)
        problem = self._functions.convolution_input_gradient(
            values.data_ptr(),
            scale.data_ptr(),
            matrix.data_ptr(),
            codes.shape[0],
            weight.shape[0],
            weight.shape[1],
            numbers_of(codes.shape[2:], weight.shape[2:], geometry),
            not codes.is_contiguous(),
            output.data_ptr(),
        )
        require_none(problem)
        return output

    def convolution_weight_gradient(
        self,
        gradient: Tensor,
        codes: Tensor,
        zero_point: int,
        factor: float,
        weight: Tensor,
        geometry: Geometry,
    ) -> Tensor:
        """See `Passes.convolution_weight_gradient`; slow where these are not supported."""
        check_gradient(gradient, codes, weight, geometry)
        check_zero_point(zero_point, codes.dtype)
        values = _with_channels_last(gradient)
        rows, channels, *kernel = weight.shape
        output = gradient.new_empty(rows, *kernel, channels)
        problem = self._functions.convolution_weight_gradient(
            values.data_ptr(),
            codes.data_ptr(),
            codes.dtype == torch.int8,
            not codes.is_contiguous(),
            zero_point,
            factor,
            codes.shape[0],
            channels,
            rows,
            numbers_of(codes.shape[2:], weight.shape[2:], geometry),
            output.data_ptr(),
        )
        require_none(problem)
        found = output.movedim(-1, 1)
        same = found.stride() == weight.stride()
        return found if same else strided_copy(found, weight.stride())


def _with_channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor with its second axis last, contiguous: no copy if it lies so in memory."""
    return tensor.movedim(1, -1).contiguous()
