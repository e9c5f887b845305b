"""The gradients of convolutions in bfloat16."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.tensors.memory_format import strided_copy


class ConvolutionGradients(ABC):
    """The gradients of convolutions among the passes."""

    @abstractmethod
    def supports_convolution_gradients(self) -> bool:
        """Return whether this has the fastest gradients of one group of channels on this CPU."""

    @abstractmethod
    def convolution_input_gradient(
        self, gradient: Tensor, weight: Tensor, scale: Tensor, codes: Tensor, geometry: Geometry
    ) -> Tensor:
        """Return the gradient of a convolution's input, of bfloat16 products summed in float32.

        The gradient times the scale is rounded to bfloat16, in which the integers are exact.

        Args:
            gradient: float32 (N, out channels, *spatial'), of the output, with any strides.
            weight: int8 (out channels, C, *kernel).
            scale: float32 (out channels,), of the weight.
            codes: the integers of the input, uint8 or int8 (N, C, *spatial), contiguous or with
                the channels last, of one to three spatial dimensions.
            geometry: of one group, unless these are plain torch operations.

        Returns:
            float32, shape and strides of `codes`.

        Raises:
            QuantizationError: the operands do not fit together, or there are several groups.
        """

    @abstractmethod
    def convolution_weight_gradient(
        self,
        gradient: Tensor,
        codes: Tensor,
        zero_point: int,
        factor: float,
        weight: Tensor,
        geometry: Geometry,
    ) -> Tensor:
        """Return the gradient of a convolution's weight, of bfloat16 products summed in float32.

        The gradient is rounded to bfloat16, in which codes - zero_point are exact.

        Args:
            gradient: as for `convolution_input_gradient`.
            codes: likewise.
            zero_point: integer of real zero in `codes`; padding is of real zeros.
            factor: a float32 number by which the result is multiplied when it is final: the scale
                of the input.
            weight: the integers of the weight, int8 (out channels, C, *kernel).
            geometry: of one group, unless these are plain torch operations.

        Returns:
            float32, shape and strides of `weight`.

        Raises:
            QuantizationError: the operands do not fit together, or there are several groups.
        """


class TorchGradients(ConvolutionGradients):
    """These gradients as plain torch operations, which round their results to bfloat16 as well."""

    def supports_convolution_gradients(self) -> bool:
        """Return False: torch computes both gradients in one call, of real numbers."""
        return False

    def convolution_input_gradient(
        self, gradient: Tensor, weight: Tensor, scale: Tensor, codes: Tensor, geometry: Geometry
    ) -> Tensor:
        """Return the gradient by torch's own function."""
        scaled = gradient * scale.reshape(-1, *[1] * len(geometry.stride))
        found = _gradients(scaled, codes, weight, geometry, [True, False, False])[0]
        return strided_copy(found.to(torch.float32), codes.stride())

    def convolution_weight_gradient(
        self,
        gradient: Tensor,
        codes: Tensor,
        zero_point: int,
        factor: float,
        weight: Tensor,
        geometry: Geometry,
    ) -> Tensor:
        """Return the gradient by torch's own function."""
        numbers = codes.to(torch.bfloat16).sub_(zero_point)  # exact up to 256
        found = _gradients(gradient, numbers, weight, geometry, [False, True, False])[1]
        return strided_copy(found.to(torch.float32).mul_(factor), weight.stride())


def _gradients(
    gradient: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    operands = (operand.to(torch.bfloat16) for operand in (gradient, input, weight))
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        *operands, None, stride, padding, dilation, False, [0] * len(stride), groups, wanted
    )
    return found
