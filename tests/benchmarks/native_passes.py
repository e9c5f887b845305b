"""Check and time the native passes against plain torch operations.

    python tests/benchmarks/native_passes.py [--threads 2] [--repeats 30]

Prints a line for each check, then the median time of each pass beside that of the other
implementation, plain torch operations, taken alternately in one process, with the bytes that a
pass has to move; then bfloat16 products in as many pieces as are fast here beside float32's
`torch.mm`, and products of integers beside torch's. Needs nothing but the package. The exit code is
1 if a check fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from compression_manager.quantization.integer.native import NativePasses
from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.torch_passes import TorchPasses

INVERSE_SCALE, ZERO_POINT, LOW, HIGH = 20.25, 121, 0, 255
SCALE = 1 / INVERSE_SCALE
ODD_SHAPES = [(1, 1, 1), (33, 65, 63), (257, 511, 129), (70, 2600, 65), (300, 513, 200)]
# Rows, depth, columns: the encoder's products for the gradient of an input and of a weight.
INPUT_GRADIENTS = [(2048, 512, 512), (2048, 512, 2048), (2048, 2048, 512)]
WEIGHT_GRADIENTS = [(512, 2048, 512), (512, 2048, 2048), (2048, 2048, 512)]
# The encoder's layers.
LAYERS = [(2048, 512, 512), (2048, 512, 2048), (2048, 2048, 512)]
# float32's own rounding, relative to the sum of the magnitudes of the terms.
TOLERANCE = 3e-7

Computation = Callable[[], object]
# Bytes for each element that have to be moved, and the pass.
Case = tuple[float, Computation]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then time; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    passes = NativePasses()
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"products of up to {max(_pieces(passes), default=0)} bfloat16 pieces, "
        f"integers by {passes.integer_kernel(torch.device('cpu'))}, {options.threads} threads"
    )
    results = [*element_checks(passes), *product_checks(passes), *integer_checks(passes)]
    for name, passed in results:
        print(f"{'PASS' if passed else 'FAIL'} {name}")
    time_passes(passes, options.repeats)
    if _pieces(passes):
        time_products(passes, options.repeats)
    else:
        print("products of bfloat16 are not timed: neither AMX nor AVX-512 BF16")
    if passes.supports_integers():
        time_integers(passes, options.repeats)
    return 0 if all(passed for _, passed in results) else 1


def element_checks(passes: NativePasses) -> Iterator[tuple[str, bool]]:
    """Yield the name of each check of an element-wise pass and whether it holds."""
    for input in (torch.randn(100_003) * 5, images(7, 5, 9, 11), torch.empty(0)):
        if input.numel() > 9:
            flat(input)[:9] = torch.tensor(
                [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 0.5, 1.5, -2.5, 3e38]
            )
        shape = tuple(input.shape)
        for zero_point, low, high in ((ZERO_POINT, LOW, HIGH), (0, -128, 127)):
            numbers = input.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
            codes, clipped = passes.quantize(
                numbers, INVERSE_SCALE, zero_point, low, high, below=True, above=True
            )
            expected, outside = quantize(numbers, zero_point, low, high)
            same = torch.equal(codes, expected) and codes.stride() == input.stride()
            yield f"quantize {shape} {codes.dtype}", same
            yield f"clipped {shape} {codes.dtype}", torch.equal(bits(clipped, input), outside)
            half = passes.dequantize(
                codes, SCALE, zero_point, torch.empty_like(codes, dtype=torch.bfloat16)
            )
            values = passes.dequantize(
                codes, SCALE, zero_point, torch.empty_like(codes, dtype=torch.float32)
            )
            yield f"dequantize to bfloat16 {shape}", torch.equal(half, values.bfloat16())
            exact = ((codes.double() - zero_point) * to_float32(SCALE)).float()
            yield f"dequantize {shape} {codes.dtype}", torch.equal(values, exact)
        if input.numel():  # of nothing there are no ends
            numbers = input.nan_to_num()
            same = passes.ends(numbers) == (float(numbers.min()), float(numbers.max()))
            yield f"ends {shape}", same
        output, positive, _ = passes.relu(input)
        yield f"relu {shape}", torch.equal(output.nan_to_num(), input.relu().nan_to_num())
        yield f"relu bits {shape}", torch.equal(bits(positive, input), ~(flat(input) <= 0))
        gradient = torch.randn_like(input)
        kept = torch.where(~(input <= 0), gradient, 0.0)
        yield f"relu_gradient {shape}", torch.equal(passes.relu_gradient(gradient, positive), kept)
        cleared = torch.where(~(input <= 0), 0.0, gradient)
        yield (
            f"clear_clipped {shape}",
            torch.equal(passes.clear_clipped(gradient, positive), cleared),
        )
    weight = torch.randn(129, 517) * 10.0 ** torch.randint(-9, 9, (129, 1))
    codes, scale = passes.quantize_rows(weight)
    expected_codes, expected_scale = quantize_rows(weight)
    yield "quantize_rows scale", torch.equal(scale, expected_scale)
    yield "quantize_rows codes", torch.equal(codes, expected_codes)
    rows = passes.dequantize_rows(codes, scale, torch.empty_like(codes, dtype=torch.float32))
    yield "dequantize_rows", torch.equal(rows, codes.float() * scale[:, None])
    half = passes.dequantize_rows(codes, scale, torch.empty_like(codes, dtype=torch.bfloat16))
    yield "dequantize_rows to bfloat16", torch.equal(half, rows.bfloat16())


def product_checks(passes: NativePasses) -> Iterator[tuple[str, bool]]:
    """Yield the name of each check of a product and whether it holds."""
    for shape in [*ODD_SHAPES, *(INPUT_GRADIENTS[:1] if _pieces(passes) else [])]:
        for dtype, zero_point in ((torch.uint8, 131), (torch.int8, 0)):
            left, right = factors(*shape, dtype)
            for pieces in (1, 3):
                used = left.bfloat16() if pieces == 1 else left
                exact = used.double() @ (right.double() - zero_point)
                terms = used.double().abs() @ (right.double() - zero_point).abs()
                outputs = {
                    "multiply": passes.multiply(left, right, zero_point, pieces),
                    "multiply_transposed": passes.multiply_transposed(
                        left.t().contiguous(), right, zero_point, pieces
                    ),
                }
                for name, output in outputs.items():
                    error = ((output - exact).abs() / terms.clamp(min=1e-300)).max().item()
                    label = f"{name} {shape} {dtype} {pieces} pieces, error {error:.1e}"
                    yield label, error < TOLERANCE


def integer_checks(passes: NativePasses) -> Iterator[tuple[str, bool]]:
    """Yield the name of each check of a product of integers and whether it holds."""
    for shape in [*ODD_SHAPES, *(LAYERS if passes.supports_integers() else [])]:
        codes, weight, scale, bias = integers(*shape)
        exact = (codes.double() - ZERO_POINT) @ weight.double().t()
        expected = exact.float().mul_(scale)
        output = passes.multiply_integers(codes, weight, ZERO_POINT, scale, None)
        yield f"multiply_integers {shape}", torch.equal(output, expected)
        output = passes.multiply_integers(codes, weight, ZERO_POINT, scale, bias)
        yield f"multiply_integers {shape} with bias", torch.equal(output, expected.add_(bias))
        left, right = factors(*shape, torch.int8)
        of_columns = torch.rand(shape[1])
        same = torch.equal(
            passes.multiply(left, right, 0, 1, of_columns),
            passes.multiply(left * of_columns, right, 0, 1),
        )
        yield f"multiply {shape} with scale", same
        left = left.t().contiguous()
        same = torch.equal(
            passes.multiply_transposed(left, right, 0, 1, 0.3),
            passes.multiply_transposed(left, right, 0, 1) * 0.3,
        )
        yield f"multiply_transposed {shape} with factor", same


def time_passes(passes: NativePasses, repeats: int) -> None:
    """Print a table of the element-wise passes, for sizes of the encoder and the ResNet."""
    print(f"\n{'pass':40}{'native ms':>11}{'torch ms':>11}{'ratio':>8}{'GB/s':>8}")
    plain = TorchPasses()
    for input in (torch.randn(2048, 512), torch.randn(2048, 2048), images(32, 64, 32, 32)):
        input.clamp_(-5.9, 5.9)
        print_cases(element_cases(passes, input), element_cases(plain, input), input, repeats)
    weight = torch.randn(2048, 512)
    print_cases(row_cases(passes, weight), row_cases(plain, weight), weight, repeats)


def print_cases(
    native: dict[str, Case], plain: dict[str, Case], input: Tensor, repeats: int
) -> None:
    """Print a row for each case: the times of both, their ratio, and the rate of the native one."""
    for name, (size, computation) in native.items():
        fast, slow = medians([computation, plain[name][1]], repeats)
        rate = input.numel() * size / fast / 1e6
        label = f"{name} {tuple(input.shape)}"
        print(f"{label:40}{fast:11.3f}{slow:11.3f}{fast / slow:8.2f}{rate:8.1f}")


def element_cases(passes: Passes, input: Tensor) -> dict[str, Case]:
    """Return the cases of one tensor, which is inside of the range of the codes."""
    grid = INVERSE_SCALE, ZERO_POINT, LOW, HIGH
    codes, _ = passes.quantize(input, *grid, below=False, above=False)
    values = torch.empty_like(codes, dtype=torch.float32)
    output, positive, _ = passes.relu(input)
    few = torch.zeros_like(positive)
    few[::1000] = 1
    clipping = input * 1.2
    return {
        "quantize": (5, lambda: passes.quantize(input, *grid, below=False, above=False)),
        "quantize_finite": (5, lambda: passes.quantize_finite(input, *grid)),
        "quantize, clipped": (
            5.125,
            lambda: passes.quantize(clipping, *grid, below=True, above=True),
        ),
        "dequantize": (5, lambda: passes.dequantize(codes, SCALE, ZERO_POINT, values)),
        "ends": (4, lambda: passes.ends(input)),
        "clear_clipped": (4.125, lambda: passes.clear_clipped(output, few)),
        "relu": (8.125, lambda: passes.relu(input)),
        "relu_gradient": (8.125, lambda: passes.relu_gradient(input, positive)),
    }


def row_cases(passes: Passes, weight: Tensor) -> dict[str, Case]:
    """Return the cases of a weight."""
    codes, scale = passes.quantize_rows(weight)
    values = torch.empty_like(codes, dtype=torch.float32)
    return {
        "quantize_rows": (5, lambda: passes.quantize_rows(weight)),
        "dequantize_rows": (5, lambda: passes.dequantize_rows(codes, scale, values)),
    }


def time_products(passes: NativePasses, repeats: int) -> None:
    """Print a table of the products: milliseconds, ratio to float32's, and rate."""
    columns = ["float32 mm", "bf16 mm"]
    for pieces in _pieces(passes):
        columns += [f"{pieces} pieces", "to float32", "TFLOPS"]
    print(f"\n{'rows, depth, columns':34}" + "".join(f"{name:>11}" for name in columns))
    for transposed in (False, True):
        for shape in WEIGHT_GRADIENTS if transposed else INPUT_GRADIENTS:
            time_product(passes, shape, transposed, repeats)


def _pieces(passes: NativePasses) -> list[int]:
    """Return the numbers of pieces that are multiplied fast here."""
    return [pieces for pieces in (1, 3) if passes.supports_pieces(pieces)]


def time_product(
    passes: NativePasses, shape: tuple[int, int, int], transposed: bool, repeats: int
) -> None:
    """Print the row of one product."""
    left, right = factors(*shape, torch.int8)
    floats = right.float()
    multiply = passes.multiply
    if transposed:
        left, multiply = left.t().contiguous(), passes.multiply_transposed

    def oriented(matrix: Tensor) -> Tensor:
        return matrix.t() if transposed else matrix

    def timed(pieces: int) -> Computation:
        return lambda: multiply(left, right, 0, pieces)

    plain, bfloat16, *native = medians(
        [
            lambda: torch.mm(oriented(left), floats),
            lambda: torch.mm(oriented(left.bfloat16()), right.bfloat16()).float(),
            *map(timed, _pieces(passes)),
        ],
        repeats,
    )
    operations = 2e-9 * shape[0] * shape[1] * shape[2]
    figures = [plain, bfloat16]
    for pieces, time_taken in zip(_pieces(passes), native, strict=True):
        figures += [time_taken, time_taken / plain, pieces * operations / time_taken]
    label = f"{'transposed ' if transposed else ''}{shape}"
    print(f"{label:34}" + "".join(f"{figure:11.3f}" for figure in figures))


def time_integers(passes: NativePasses, repeats: int) -> None:
    """Print a table of the products of integers: milliseconds, and rate of the native one."""
    names = ("native", "qlinear", "packed", "_int_mm", "float32 mm", "TOPS")
    print(f"\n{'integers: rows, depth, columns':34}" + "".join(f"{name:>11}" for name in names))
    for shape in LAYERS:
        time_layer(passes, shape, repeats)


def time_layer(passes: NativePasses, shape: tuple[int, int, int], repeats: int) -> None:
    """Print the row of one product of integers."""
    codes, weight, scale, bias = integers(*shape)
    signed, floats, transposed = codes.view(torch.int8), codes.float(), weight.float().t()
    row_scale, zeros = scale / SCALE, torch.zeros(scale.shape, dtype=torch.int32)

    def prepack() -> Tensor:
        packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))
        return packed

    def qlinear(packed: Tensor) -> None:
        torch.ops.onednn.qlinear_pointwise(
            codes, SCALE, ZERO_POINT, packed, row_scale, zeros, bias, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip

    kept = prepack()
    times = medians(
        [
            lambda: passes.multiply_integers(codes, weight, ZERO_POINT, scale, bias),
            lambda: qlinear(prepack()),
            lambda: qlinear(kept),
            lambda: torch._int_mm(signed, weight.t()),
            lambda: torch.mm(floats, transposed),
        ],
        repeats,
    )
    figures = (*times, 2e-9 * shape[0] * shape[1] * shape[2] / times[0])
    print(f"{shape!s:34}" + "".join(f"{figure:11.3f}" for figure in figures))


def medians(computations: Sequence[Computation], repeats: int) -> list[float]:
    """Return the median milliseconds of each, taken alternately."""
    times: list[list[float]] = [[] for _ in computations]
    for repeat in range(repeats + 3):
        for computation, taken in zip(computations, times, strict=True):
            start = time.perf_counter()
            computation()
            if repeat >= 3:
                taken.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


def quantize(input: Tensor, zero_point: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return codes and, in the order of memory, what was clipped, by plain torch operations."""
    unclamped = (input * INVERSE_SCALE).round_().add_(zero_point)
    codes = unclamped.clamp(low, high)
    return codes.to(torch.uint8 if low >= 0 else torch.int8), flat(unclamped != codes)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of rows by plain torch operations."""
    scale = (weight.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).eps)
    codes = (weight * scale.reciprocal()[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


def factors(rows: int, depth: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a left and a right factor."""
    limits = torch.iinfo(dtype)
    codes = torch.randint(limits.min, limits.max + 1, (depth, columns), dtype=dtype)
    return torch.randn(rows, depth), codes


def integers(rows: int, depth: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, a weight's codes, scales and a bias."""
    codes = torch.randint(0, 256, (rows, depth), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (columns, depth), dtype=torch.int8)
    return codes, weight, torch.rand(columns) * SCALE, torch.randn(columns)


def images(*shape: int) -> Tensor:
    """Return a channels_last tensor."""
    return (torch.randn(*shape) * 5).to(memory_format=torch.channels_last)


def flat(tensor: Tensor) -> Tensor:
    """Return the elements in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def bits(mask: Tensor | None, elements: Tensor) -> Tensor:
    """Return a packed mask as booleans."""
    assert mask is not None  # as it was asked for
    return (mask[:, None] >> torch.arange(8) & 1).bool().flatten()[: elements.numel()]


def to_float32(value: float) -> float:
    """Return `value` rounded to float32."""
    return torch.tensor(value, dtype=torch.float32).item()


if __name__ == "__main__":
    sys.exit(main())
