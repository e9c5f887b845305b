"""Linear, convolution and sum on integer operands, differentiable.

Between forward and backward the integers of factors are kept, and bits of what was clipped; no
float copies. The gradients are those of the straight-through estimator: with float32 products they
are, bit for bit, those of the functions of `arithmetic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.quantization.autograd import differentiable_once
from compression_manager.quantization.integer import products
from compression_manager.quantization.integer.geometry import Geometry, convolution
from compression_manager.quantization.integer.operands import IntegerInput, IntegerWeight
from compression_manager.quantization.integer.options import PIECES, Backward
from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.scratch import values_of
from compression_manager.quantization.tensors.memory_format import strided_copy


@dataclass(eq=False, slots=True)
class Operands:
    """The integers of one call, and how it computes; opaque to autograd.

    Attributes:
        input: the quantized activation.
        weight: the quantized weight.
        passes: what computes the passes.
        backward: how gradients are multiplied.
        integers: whether integers are multiplied; else the real numbers that they stand for.
        packs: as for `products.linear`.
    """

    input: IntegerInput
    weight: IntegerWeight
    passes: Passes
    backward: Backward
    integers: bool = False
    packs: bool = False

    def save(self, ctx: Any) -> None:
        """Keep for the backward pass what it needs, as tensors that checkpointing can follow."""
        ctx.backward, ctx.passes = self.backward, self.passes
        ctx.save_for_backward(
            self.input.codes,
            self.input.scale,
            self.input.zero_point,
            self.input.clipped,
            self.weight.codes,
            self.weight.scale,
            self.weight.clipped,
        )

    @classmethod
    def saved(cls, ctx: Any) -> Operands:
        """Return what `save` kept."""
        tensors = ctx.saved_tensors  # read once, as activation checkpointing demands
        weight = IntegerWeight(*tensors[4:])
        return cls(IntegerInput(*tensors[:4]), weight, ctx.passes, ctx.backward)

    def float_input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the real numbers of the input's integers, until this is called again."""
        codes, scale, zero_point = self.input.codes, self.input.scale, self.input.zero_point

        def write(out: Tensor) -> None:
            if scale.is_cpu:
                self.passes.dequantize(codes, float(scale), int(zero_point), out)
            else:
                self.passes.dequantize(codes, scale, zero_point, out)

        return values_of(codes, dtype, "input", write)

    def float_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the real numbers of the weight's integers, until this is called again."""
        codes, scale = self.weight.codes, self.weight.scale
        write = partial(self.passes.dequantize_rows, codes, scale)
        return values_of(codes, dtype, "weight", write)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the input from that of its quantized values."""
        return self._unclipped(gradient, self.input.codes, self.input.clipped)

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the weight from that of its quantized values."""
        return self._unclipped(gradient, self.weight.codes, self.weight.clipped)

    def _unclipped(self, gradient: Tensor, codes: Tensor, clipped: Tensor | None) -> Tensor:
        if clipped is None:
            return gradient
        if gradient.stride() != codes.stride():
            # The bits lie in the order of the codes in memory.
            gradient = strided_copy(gradient, codes.stride())
        return self.passes.clear_clipped(gradient, clipped)


class IntegerLinear(torch.autograd.Function):
    """`F.linear` of an input and of each part of a weight, whose values the operands hold.

    Attention projects one tensor with the three parts of one Parameter. The arguments are weight,
    bias, operands, and for each part the input, so that autograd adds up its gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, operands: Operands, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        operands.save(ctx)
        count = len(inputs)
        biases = [None] if bias is None else _parts(bias, count)
        if operands.integers:
            outputs = [
                products.linear(operands.input, part, addend, operands.passes, packs=operands.packs)
                for part, addend in zip(operands.weight.parts(count), cycle(biases))
            ]
        else:
            values, weights = operands.float_input(), _parts(operands.float_weight(), count)
            outputs = [F.linear(values, *pair) for pair in zip(weights, cycle(biases))]
        return tuple(map(_owned, outputs))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        operands, wanted = Operands.saved(ctx), ctx.needs_input_grad
        rows = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        for_weight = for_bias = None
        for_inputs: list[Tensor | None] = [None] * len(rows)
        if wanted[0]:
            for_weight = operands.weight_gradient(_joined(_by_input(rows, operands)))
        if wanted[1]:
            for_bias = _joined([part.sum(0) for part in rows])
        if wanted[3]:
            shape = operands.input.codes.shape
            for_inputs = [
                operands.input_gradient(product.reshape(shape))
                for product in _by_weight(rows, operands)
            ]
        # In the order in which the gradients of layers of their own would arrive.
        return for_weight, for_bias, None, *reversed(for_inputs)


def _owned(output: Tensor) -> Tensor:
    """Return `output` as a tensor of its own: autograd lets nobody change a Function's view."""
    return output.detach() if output._is_view() else output


def _by_weight(rows: list[Tensor], operands: Operands) -> list[Tensor]:
    """Return gradient @ weight of each part: (rows, in features)."""
    if operands.backward == "float32":
        weights = _parts(operands.float_weight(), len(rows))
        return [part.mm(weight) for part, weight in zip(rows, weights, strict=True)]
    pieces, parts = PIECES[operands.backward], operands.weight.parts(len(rows))
    return [
        operands.passes.multiply(part, weight.codes, 0, pieces, weight.scale)
        for part, weight in zip(rows, parts, strict=True)
    ]


def _by_input(rows: list[Tensor], operands: Operands) -> list[Tensor]:
    """Return gradient.T @ input of each part: (out features, in features)."""
    width = operands.input.codes.shape[-1]
    if operands.backward == "float32":
        values = operands.float_input().reshape(-1, width)
        return [part.t().mm(values) for part in rows]
    input, pieces = operands.input, PIECES[operands.backward]
    codes, zero_point, scale = input.codes.reshape(-1, width), input.zero_point, input.scale
    return [
        operands.passes.multiply_transposed(part, codes, int(zero_point), pieces, float(scale))
        for part in rows
    ]


def _parts(tensor: Tensor, count: int) -> Sequence[Tensor]:
    return [tensor] if count == 1 else tensor.chunk(count)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class IntegerConvolution(torch.autograd.Function):
    """The convolution of (input, weight, bias), whose values the operands hold."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Operands,
        geometry: Geometry,
    ) -> Tensor:
        operands.save(ctx)
        ctx.geometry, ctx.bias_sizes = geometry, None if bias is None else list(bias.shape)
        if operands.integers:
            return products.convolve(
                operands.input,
                operands.weight,
                bias,
                geometry,
                operands.passes,
                packs=operands.packs,
            )
        return convolution(operands.float_input(), operands.float_weight(), bias, geometry)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        operands = Operands.saved(ctx)
        wanted = ctx.needs_input_grad[:2]
        needs_bias = ctx.bias_sizes is not None and ctx.needs_input_grad[2]
        for_bias: Tensor | None
        if _has_native_gradients(operands, ctx.geometry):
            for_input, for_weight = _native_gradients(operands, gradient, ctx.geometry, *wanted)
            for_bias = gradient.sum([0, *range(2, gradient.dim())]) if needs_bias else None
        else:
            stride, padding, dilation, groups = ctx.geometry
            dtype = torch.bfloat16 if operands.backward == "bfloat16" else torch.float32
            for_input, for_weight, for_bias = torch.ops.aten.convolution_backward(
                gradient.to(dtype),
                operands.float_input(dtype),
                operands.float_weight(dtype),
                ctx.bias_sizes,
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                groups,
                [*wanted, needs_bias],
            )
        if for_input is not None:
            for_input = operands.input_gradient(for_input.float())
        if for_weight is not None:
            for_weight = operands.weight_gradient(for_weight.float())
        return for_input, for_weight, None if for_bias is None else for_bias.float(), None, None


def _has_native_gradients(operands: Operands, geometry: Geometry) -> bool:
    """Return whether the passes compute the gradients of a convolution, faster than torch."""
    return (
        operands.backward == "bfloat16"
        and geometry.groups == 1
        and operands.passes.supports_convolution_gradients()
    )


def _native_gradients(
    operands: Operands,
    gradient: Tensor,
    geometry: Geometry,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the quantized values of a convolution's input and weight."""
    input, weight, passes = operands.input, operands.weight, operands.passes
    for_input = for_weight = None
    if needs_input:
        for_input = passes.convolution_input_gradient(
            gradient, weight.codes, weight.scale, input.codes, geometry
        )
    if needs_weight:
        zero_point, scale = int(input.zero_point), float(input.scale)
        for_weight = passes.convolution_weight_gradient(
            gradient, input.codes, zero_point, scale, weight.codes, geometry
        )
    return for_input, for_weight


class IntegerSum(torch.autograd.Function):
    """The sum of (input, residual), the residual's values being those that integers stand for."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, residual: Tensor, integers: IntegerInput, passes: Passes
    ) -> Tensor:
        ctx.passes, ctx.stride = passes, integers.codes.stride()
        if integers.clipped is not None:
            ctx.save_for_backward(integers.clipped)
        return products.add(input, integers, passes)

    @staticmethod
    @partial(differentiable_once, has_constant_factor=True)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once, as activation checkpointing demands
        for_residual = gradient
        if saved and ctx.needs_input_grad[1]:
            # The bits lie in the order of the codes in memory.
            for_residual = ctx.passes.clear_clipped(strided_copy(gradient, ctx.stride), *saved)
        return gradient, for_residual, None, None
