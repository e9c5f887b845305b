"""The passes as plain torch operations, for every device."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic.parameters import symmetric_scale
from compression_manager.quantization.arithmetic.ranges import extremes
from compression_manager.quantization.integer import exact
from compression_manager.quantization.integer.bits import (
    bytes_of,
    clear_marked,
    keep_marked,
    no_bits,
    pack_nonzero,
)
from compression_manager.quantization.integer.cpu_features import cpu_features
from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.integer.gradients import TorchGradients
from compression_manager.quantization.integer.parts import part_length, parts, row_parts
from compression_manager.quantization.integer.passes import ROWS, Ends, Passes
from compression_manager.quantization.integer.rounding import Rounding
from compression_manager.quantization.tensors.memory_format import formatted_like, in_memory_order


class TorchPasses(TorchGradients, Passes):
    """Always there; scales may be tensors, so that an accelerator need not be waited for."""

    name = "torch"

    def ends(self, input: Tensor) -> Ends:
        """Return the smallest and the largest element."""
        low, high = extremes(input)
        return float(low), float(high)

    def quantize(
        self,
        input: Tensor,
        inverse_scale: float | Tensor,
        zero_point: int | Tensor,
        quant_min: int,
        quant_max: int,
        *,
        below: bool,
        above: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return codes and clipped bits."""
        rounding, clips = Rounding(inverse_scale, zero_point, quant_min, quant_max), below or above
        codes = _round(input, rounding, clips=clips)
        if not clips:
            return codes, None
        flat, flat_codes = in_memory_order(input), in_memory_order(codes)
        return codes, rounding.find_clipped(flat, flat_codes, below=below, above=above)

    def quantize_finite(
        self, input: Tensor, inverse_scale: float, zero_point: int, quant_min: int, quant_max: int
    ) -> Tensor | None:
        """Return codes, unless an element is not finite."""
        if not all(map(math.isfinite, self.ends(input))):
            return None
        return _round(input, Rounding(inverse_scale, zero_point, quant_min, quant_max), clips=True)

    def quantize_rows(self, weight: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return codes and scales of symmetric 8-bit rows."""
        codes = torch.empty_like(weight, dtype=torch.int8)
        matrix = in_memory_order(weight).view(weight.shape[0], -1)
        # The ends of rows are found by vector instructions, their norm is not.
        largest = torch.maximum(matrix.amax(1), -matrix.amin(1))
        scale = symmetric_scale(largest, ROWS)
        is_finite = weight.device.type == "cpu" and math.isfinite(scale.sum())
        code_rows = in_memory_order(codes).view_as(matrix)
        for rows, inverse, done in row_parts(matrix, scale.reciprocal()[:, None], code_rows):
            # Never outside of the range, whose end is the largest value itself.
            steps = (rows * inverse).round_()
            done.copy_(steps if is_finite else steps.nan_to_num_(nan=0.0))
        if values is not None:
            self.dequantize_rows(codes, scale, values)
        return codes, scale

    def dequantize(
        self,
        codes: Tensor,
        scale: float | Tensor,
        zero_point: int | Tensor,
        out: Tensor,
    ) -> Tensor:
        """Write (codes - zero point) * scale."""
        values = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        flat, flat_codes = in_memory_order(values), in_memory_order(codes)
        for part in parts(flat):
            _steps(flat_codes[part], zero_point, flat[part]).mul_(scale)
        return out if values is out else out.copy_(values)

    def add_dequantized(
        self, addend: Tensor, codes: Tensor, scale: float, zero_point: int
    ) -> Tensor:
        """Return addend + (codes - zero point) * scale."""
        output = torch.empty_like(codes, dtype=torch.float32)
        flat, flat_codes, flat_addend = map(in_memory_order, (output, codes, addend))
        for part in parts(flat):
            _steps(flat_codes[part], zero_point, flat[part]).mul_(scale).add_(flat_addend[part])
        return output

    def dequantize_rows(self, codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """Write codes * scale of their row."""
        column = scale.reshape(-1, *[1] * (codes.dim() - 1))
        if out.dtype == torch.float32:
            return out.copy_(codes).mul_(column)
        return out.copy_(codes.to(torch.float32).mul_(column))

    def clear_clipped(self, gradient: Tensor, clipped: Tensor) -> Tensor:
        """Zero the gradient in place where a bit is set."""
        clear_marked(in_memory_order(gradient), clipped)
        return gradient

    def relu(self, input: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return max(input, 0) and the bits of what is not at most zero."""
        output = torch.empty_like(input)
        flat, flat_output = in_memory_order(input), in_memory_order(output)
        bits = no_bits(flat)
        for part in parts(flat):
            passed = torch.clamp_min(flat[part], 0.0, out=flat_output[part])
            bits[bytes_of(part)] = pack_nonzero(passed)
        return output, bits, None

    def relu_gradient(self, gradient: Tensor, positive: Tensor) -> Tensor:
        """Return the gradient where a bit is set, else zero."""
        passed = torch.empty_like(gradient)
        flat, flat_passed = in_memory_order(gradient), in_memory_order(passed)
        for part in parts(flat):
            keep_marked(flat[part], positive[bytes_of(part)], out=flat_passed[part])
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
            return "torch._int_mm (scales and bias in a second pass)"
        return "float32 products, summed exactly"

    def multiply_integers(
        self,
        codes: Tensor,
        weight: Tensor,
        zero_point: int | Tensor,
        scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Return the product; of float32 kernels on CPUs without VNNI, but as exact."""
        matrix = codes.view(codes.shape[:-1].numel(), weight.shape[1])
        if _has_integer_product(codes.device):
            sums, offsets = _integer_sums(matrix, weight, zero_point)
            output = sums.view(torch.float32)  # which takes the place of the sums
        else:
            sums, offsets = exact.product(matrix, int(zero_point), weight), None
            output = sums
        for part, done in row_parts(sums, output):
            numbers = part if offsets is None else part.sub_(offsets)
            # A number takes the place of the sum that it is made of, where it is still in a cache.
            done.copy_(numbers).mul_(scale)
            if bias is not None:
                done.add_(bias)
        return output.view(*codes.shape[:-1], weight.shape[0])

    def convolve_integers(
        self,
        codes: Tensor,
        weight: Tensor,
        zero_point: int,
        scale: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        """Return the convolution; of float32 kernels, but exact."""
        sums = exact.convolve(codes, zero_point, weight, geometry)
        column = (-1, *[1] * len(geometry.stride))
        output = formatted_like(sums, codes).mul_(scale.reshape(column))
        return output if bias is None else output.add_(bias.reshape(column))

    def _check_pieces(self, pieces: int) -> None:
        if not self.supports_pieces(pieces):
            # torch's bfloat16 products have bfloat16 results, which undo what the pieces gain.
            raise QuantizationError(f"plain torch operations take one piece, got pieces={pieces}.")


def _round(input: Tensor, rounding: Rounding, *, clips: bool) -> Tensor:
    """Return the integers of a dense tensor; `clips` as for `Rounding.write`."""
    codes = torch.empty_like(input, dtype=torch.uint8 if rounding.quant_min >= 0 else torch.int8)
    flat, flat_codes = in_memory_order(input), in_memory_order(codes)
    write = rounding.write_bytes if input.is_cpu else rounding.write
    space = flat.new_empty(part_length(flat))
    if len(space) == len(flat):  # Slicing takes as long as a pass over a small tensor.
        write(flat, flat_codes, space, clips=clips)
        return codes
    for part in parts(flat):
        write(flat[part], flat_codes[part], space[: part.stop - part.start], clips=clips)
    return codes


def _has_integer_product(device: torch.device) -> bool:
    """Return whether torch's product of integers is exact and fast."""
    return device.type != "cpu" or cpu_features().vnni


def _steps(codes: Tensor, zero_point: int | Tensor, out: Tensor) -> Tensor:
    """Write codes - zero point to `out`, and return it."""
    out.copy_(codes)
    # What a ReLU returned has none.
    return out if isinstance(zero_point, int) and not zero_point else out.sub_(zero_point)


def _integer_sums(codes: Tensor, weight: Tensor, zero_point: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return int32 sums and, for each column, what is to be subtracted for the zero point."""
    if codes.device.type != "cpu" or not _multiplies_unsigned():
        # Flipping the highest bit subtracts 128.
        codes, zero_point = (codes ^ 128).view(torch.int8), zero_point - 128
    codes, weight = codes.contiguous(), weight.contiguous()
    # On the CPU torch takes leading dimensions from the strides, which say nothing where a size is
    # one, and returns garbage if they are less than the other size (pytorch issue 195066).
    (rows, depth), columns = codes.shape, weight.shape[0]
    left = codes.as_strided((rows, depth), (depth, 1))
    right = weight.as_strided((depth, columns), (1, depth) if depth > 1 else (columns, 1))
    return torch._int_mm(left, right), zero_point * weight.sum(1, dtype=torch.int32)


@cache
def _multiplies_unsigned() -> bool:
    """Return whether torch multiplies unsigned integers on the CPU, which 2.11 refuses."""
    try:
        torch._int_mm(torch.ones(1, 1, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.int8))
    except RuntimeError:
        return False
    return True


def _exact(codes: Tensor, zero_point: int) -> Tensor:
    """Return codes - zero point, of which bfloat16 holds every value up to 256."""
    values = codes.to(torch.bfloat16)
    return values.sub_(zero_point) if zero_point else values
