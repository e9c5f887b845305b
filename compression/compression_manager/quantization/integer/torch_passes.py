"""The passes as plain torch operations, for every device."""

from __future__ import annotations

import torch
from torch import Tensor

from compression_manager.quantization.integer.bits import pack_mask, unpack_mask
from compression_manager.quantization.integer.cpu_features import cpu_features
from compression_manager.quantization.integer.passes import ROWS, Passes, in_memory_order
from compression_manager.quantization.parameters import compute_qparams


class TorchPasses(Passes):
    """Always there; scales may be tensors, so that an accelerator need not be waited for."""

    name = "torch"

    def quantize(
        self,
        input: Tensor,
        inverse_scale: float | Tensor,
        zero_point: int | Tensor,
        quant_min: int,
        quant_max: int,
        clips: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return codes and clipped bits."""
        dtype = torch.uint8 if quant_min >= 0 else torch.int8
        steps = (input * inverse_scale).round_().add_(zero_point)
        if not clips:
            return steps.to(dtype), None
        inside = steps.clamp(quant_min, quant_max)
        clipped = steps != inside
        bits = None
        if input.device.type != "cpu" or bool(clipped.any()):
            bits = pack_mask(in_memory_order(clipped))
        inside = torch.where(inside.isnan(), zero_point, inside) if bits is not None else inside
        return inside.to(dtype), bits

    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales of symmetric 8-bit rows."""
        largest = torch.linalg.vector_norm(weight, torch.inf, dim=1)
        scale, _ = compute_qparams(-largest, largest, ROWS)
        # Never outside of the range, whose end is the largest value itself.
        return (weight * scale.reciprocal()[:, None]).round_().to(torch.int8), scale

    def dequantize(
        self,
        codes: Tensor,
        scale: float | Tensor,
        zero_point: int | Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return (codes - zero point) * scale."""
        return codes.to(torch.float32).sub_(zero_point).mul_(scale).to(dtype)

    def dequantize_rows(
        self, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return codes * scale of their row."""
        column = scale.reshape(-1, *[1] * (codes.dim() - 1))
        return codes.to(torch.float32).mul_(column).to(dtype)

    def clear_clipped(self, gradient: Tensor, clipped: Tensor) -> Tensor:
        """Zero the gradient in place where a bit is set."""
        flat = in_memory_order(gradient)
        flat.masked_fill_(unpack_mask(clipped, flat.numel()), 0.0)
        return gradient

    def relu(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return max(input, 0) and the bits of what is not at most zero."""
        flat = in_memory_order(input)
        return input.relu(), pack_mask((flat <= 0).logical_not_())

    def relu_gradient(self, gradient: Tensor, positive: Tensor) -> Tensor:
        """Return the gradient where a bit is set, else zero."""
        flat = in_memory_order(gradient)
        passed = torch.where(unpack_mask(positive, flat.numel()), flat, 0.0)
        return passed.as_strided(gradient.shape, gradient.stride())

    def multiply(
        self,
        left: Tensor,
        right: Tensor,
        zero_point: int,
        pieces: int,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Return the product in bfloat16; torch rounds the result to bfloat16 as well."""
        self._check_pieces(pieces)
        left = left if scale is None else left * scale
        product = left.to(torch.bfloat16) @ _exact(right, zero_point)
        return product.to(torch.float32)

    def multiply_transposed(
        self, left: Tensor, right: Tensor, zero_point: int, pieces: int, factor: float = 1.0
    ) -> Tensor:
        """Return left.T @ (right - zero point) in bfloat16, rounded to bfloat16 as well."""
        self._check_pieces(pieces)
        product = left.to(torch.bfloat16).t() @ _exact(right, zero_point)
        return product.to(torch.float32).mul_(factor)

    def supports_pieces(self, pieces: int) -> bool:
        """Return whether products of so many pieces are computed; only those of one."""
        return pieces == 1

    def supports_integers(self) -> bool:
        """Return False: the operators that torch has for this itself are faster."""
        return False

    def multiply_integers(
        self, codes: Tensor, weight: Tensor, zero_point: int, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return the product; summed in float64, which is exact, unless the CPU has VNNI."""
        if codes.device.type == "cpu" and cpu_features().vnni:
            # Flipping the highest bit subtracts 128.
            sums = torch._int_mm((codes ^ 128).view(torch.int8), weight.t())
            sums.sub_((zero_point - 128) * weight.sum(1, dtype=torch.int32))
        else:
            sums = (codes.double() - zero_point) @ weight.double().t()
        output = sums.to(torch.float32).mul_(scale)
        return output if bias is None else output.add_(bias)

    def _check_pieces(self, pieces: int) -> None:
        if not self.supports_pieces(pieces):
            # torch's bfloat16 products have bfloat16 results, which undo what the pieces gain.
            raise NotImplementedError("plain torch operations multiply one bfloat16 piece only.")


def _exact(codes: Tensor, zero_point: int) -> Tensor:
    """Return codes - zero point, of which bfloat16 holds every value up to 256."""
    values = codes.to(torch.bfloat16)
    return values.sub_(zero_point) if zero_point else values
