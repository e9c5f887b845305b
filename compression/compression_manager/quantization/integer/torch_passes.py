"""The passes as plain torch operations, for every device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.bits import pack_mask, unpack_mask
from compression_manager.quantization.integer.cpu_features import cpu_features
from compression_manager.quantization.integer.passes import ROWS, Passes
from compression_manager.quantization.memory_format import in_memory_order
from compression_manager.quantization.parameters import compute_qparams

# Elements: half a mebibyte of float32, a part of one core's second-level cache. Full bytes of bits.
_PART = 1 << 17


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
        codes = torch.empty_like(input, dtype=torch.uint8 if quant_min >= 0 else torch.int8)
        flat, flat_codes = in_memory_order(input), in_memory_order(codes)
        bits = flat.new_zeros(-(-flat.numel() // 8), dtype=torch.uint8) if clips else None
        any_clipped = input.device.type != "cpu"
        for part in _parts(flat):
            steps = (flat[part] * inverse_scale).round_().add_(zero_point)
            if bits is not None and not _lies_inside(steps, quant_min, quant_max):
                inside = steps.clamp(quant_min, quant_max)
                bits[_bytes(part)] = pack_mask(steps != inside)
                any_clipped = True
                steps = _with_zero_point(inside, zero_point)
            flat_codes[part].copy_(steps)
        return codes, bits if any_clipped else None

    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales of symmetric 8-bit rows."""
        largest = torch.linalg.vector_norm(weight, torch.inf, dim=1)
        scale, _ = compute_qparams(-largest, largest, ROWS)
        # Never outside of the range, whose end is the largest value itself.
        steps = (weight * scale.reciprocal()[:, None]).round_()
        return steps.nan_to_num_(nan=0.0).to(torch.int8), scale

    def dequantize(
        self,
        codes: Tensor,
        scale: float | Tensor,
        zero_point: int | Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return (codes - zero point) * scale."""
        values = torch.empty_like(codes, dtype=torch.float32)
        flat, flat_codes = in_memory_order(values), in_memory_order(codes)
        for part in _parts(flat):
            flat[part].copy_(flat_codes[part]).sub_(zero_point).mul_(scale)
        return values.to(dtype)

    def dequantize_rows(
        self, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return codes * scale of their row."""
        column = scale.reshape(-1, *[1] * (codes.dim() - 1))
        return codes.to(torch.float32).mul_(column).to(dtype)

    def clear_clipped(self, gradient: Tensor, clipped: Tensor) -> Tensor:
        """Zero the gradient in place where a bit is set."""
        flat = in_memory_order(gradient)
        for part in _parts(flat):
            bits = clipped[_bytes(part)]
            if gradient.device.type != "cpu" or bool(bits.any()):
                flat[part].masked_fill_(unpack_mask(bits, flat[part].numel()), 0.0)
        return gradient

    def relu(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return max(input, 0) and the bits of what is not at most zero."""
        flat = in_memory_order(input)
        bits = [pack_mask((flat[part] <= 0).logical_not_()) for part in _parts(flat)]
        return input.relu(), torch.cat(bits)

    def relu_gradient(self, gradient: Tensor, positive: Tensor) -> Tensor:
        """Return the gradient where a bit is set, else zero."""
        passed = torch.empty_like(gradient)
        flat, flat_passed = in_memory_order(gradient), in_memory_order(passed)
        for part in _parts(flat):
            mask = unpack_mask(positive[_bytes(part)], flat[part].numel())
            torch.where(mask, flat[part], flat.new_zeros(()), out=flat_passed[part])
        return passed

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

    def integer_kernel(self, device: torch.device) -> str:
        """Return the name of the operator."""
        if _has_integer_product(device):
            return "torch._int_mm; scales and bias in a second pass"
        return "exact float64 sums"

    def multiply_integers(
        self,
        codes: Tensor,
        weight: Tensor,
        zero_point: int | Tensor,
        scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Return the product; summed in float64, which is exact, on CPUs without VNNI."""
        offsets: Tensor | int = 0
        if _has_integer_product(codes.device):
            # Flipping the highest bit subtracts 128.
            sums = torch._int_mm((codes ^ 128).view(torch.int8), weight.t())
            offsets = (zero_point - 128) * weight.sum(1, dtype=torch.int32)
        else:
            sums = (codes.double() - zero_point) @ weight.double().t()
        output = torch.empty(sums.shape, dtype=torch.float32, device=sums.device)
        for part, done in zip(_row_parts(sums), _row_parts(output), strict=True):
            done.copy_(part.sub_(offsets)).mul_(scale)
            if bias is not None:
                done.add_(bias)
        return output

    def _check_pieces(self, pieces: int) -> None:
        if not self.supports_pieces(pieces):
            # torch's bfloat16 products have bfloat16 results, which undo what the pieces gain.
            raise QuantizationError(f"plain torch operations take one piece, got pieces={pieces}.")


def _has_integer_product(device: torch.device) -> bool:
    """Return whether torch's product of integers is exact and fast."""
    return device.type != "cpu" or cpu_features().vnni


def _parts(flat: Tensor) -> Iterator[slice]:
    """Yield parts of a vector that stay in cache from one operation to the next.

    Memory is slower than the operations, so that each of them would wait for it anew.
    """
    count = flat.numel()
    length = _PART if flat.device.type == "cpu" else max(count, 1)
    for start in range(0, max(count, 1), length):
        yield slice(start, min(start + length, count))


def _row_parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """Return a matrix as rows that stay in cache, as `_parts` does; whole on an accelerator."""
    rows = _PART // max(matrix.shape[1], 1) if matrix.device.type == "cpu" else matrix.shape[0]
    parts: tuple[Tensor, ...] = matrix.split(max(rows, 1))
    return parts


def _lies_inside(steps: Tensor, quant_min: int, quant_max: int) -> bool:
    """Return whether nothing is to be clipped; on an accelerator, which is not asked, never."""
    if steps.device.type != "cpu" or not steps.numel():
        return False
    low, high = torch.aminmax(steps)
    return float(low) >= quant_min and float(high) <= quant_max  # not so if they are no numbers


def _with_zero_point(steps: Tensor, zero_point: int | Tensor) -> Tensor:
    """Return `steps`, in place of which the zero point stands for what is not a number."""
    if isinstance(zero_point, Tensor):
        return torch.where(steps.isnan(), zero_point, steps)
    return steps.nan_to_num_(nan=float(zero_point))


def _bytes(part: slice) -> slice:
    """Return the bytes that hold the bits of the elements of a part."""
    return slice(part.start // 8, -(-part.stop // 8))


def _exact(codes: Tensor, zero_point: int) -> Tensor:
    """Return codes - zero point, of which bfloat16 holds every value up to 256."""
    values = codes.to(torch.bfloat16)
    return values.sub_(zero_point) if zero_point else values
