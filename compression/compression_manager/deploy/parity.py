"""Proof that a converted model computes what was trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.deploy.converted_run import describe_reads, run_converted
from compression_manager.deploy.differences import (
    difference,
    finite,
    largest_error,
    steps_apart,
)
from compression_manager.deploy.replacement import Replacement
from compression_manager.deploy.stored_integers import check_integers
from compression_manager.errors import ParityError
from compression_manager.models.calling import (
    call_with_examples,
    quiet_evaluation,
    tensors_in,
)
from compression_manager.quantization.layers import QuantizedLayer
from compression_manager.quantization.layers.decisions import computes_integers

# A layer and its conversion get the same input and multiply the same numbers, so that only the
# order of float32 sums (and folding BatchNorm into the scale) may differ.
LAYER_TOLERANCE = 1e-4

# Over the whole model such a difference can move a value across a rounding threshold, so that a
# few elements of later layers differ by a step of their grid.
MODEL_TOLERANCE = 2e-2

# Quantized to 8 bits, a layer's two outputs differ by one step in so few elements at most, where
# their float32 sums lie on either side of a rounding threshold.
STEP_SHARE = 1e-3

_OUTSIDE = "the model computes something outside of its layers that differs"

# Narrower types round each result (and a folded weight) by up to half their epsilon.
_EPSILONS = 4


@dataclass(frozen=True)
class Parity:
    """How close a converted model is to the trained one.

    Attributes:
        layer_errors: layer -> largest absolute difference for equal input, divided by the
            largest absolute output. Layers that the input did not reach are absent.
        layer_steps: layer -> share of the output's elements that fall on another step of an
            8-bit grid over its range, as the next layer's input would; differences of less than
            `differences.SAME_VALUE` of the largest output do not count.
        exact_layers: those whose outputs are equal to the last bit; with integer products all
            that absorbed no BatchNorm.
        output_error: root mean square difference of the model's outputs, divided by the root
            mean square of the trained model's.
        read_weights: layers whose weight the model's own code reads, which are rounded there now
            and were not in training.
    """

    layer_errors: dict[str, float]
    output_error: float
    layer_steps: dict[str, float] = field(default_factory=dict)
    exact_layers: tuple[str, ...] = ()
    read_weights: tuple[str, ...] = ()

    @property
    def worst_layer(self) -> str | None:
        """Name of the layer with the largest error."""
        return max(self.layer_errors, key=self.layer_errors.__getitem__, default=None)

    def __str__(self) -> str:
        worst = self.worst_layer
        layers = "no layer was reached" if worst is None else f"{self.layer_errors[worst]:.1e}"
        where = "" if worst is None else f" ('{worst}')"
        return (
            f"parity of the converted model: relative error of the output {self.output_error:.1e}, "
            f"largest of a layer on equal input {layers}{where}; {len(self.exact_layers)} of "
            f"{len(self.layer_errors)} layers agree to the last bit"
            f"{'; ' if self.read_weights else ''}{describe_reads(self.read_weights)}"
        )


@torch.no_grad()
def check_parity(
    trained: nn.Module,
    converted: nn.Module,
    replacements: Sequence[Replacement],
    example_inputs: Any,
) -> Parity:
    """Compare both models layer by layer on equal inputs, then end to end.

    Args:
        trained: the quantization-aware model, in eval mode.
        converted: its conversion, in eval mode.
        replacements: the layers to compare.
        example_inputs: what the models are called with.

    Raises:
        ParityError: naming the first layer, in the order of execution, that differs by more
            than `LAYER_TOLERANCE`, one that stores other integers than the trained layer has, or
            the model's output beyond `MODEL_TOLERANCE` (more in bfloat16 and float16).
        ConfigError: the trained model does not take `example_inputs`.
    """
    # Each run starts from the same random state.
    with full_precision(), ExitStack() as stack, quiet_evaluation(trained, restore_buffers=True):
        comparisons = _watch_layers(stack, trained, replacements)
        expected = list(tensors_in(call_with_examples(trained, example_inputs)))
    for layer, comparison in comparisons.items():
        comparison.check(layer)
    check_integers(trained, replacements)
    with full_precision():
        run = run_converted(converted, replacements, comparisons, example_inputs)
    error, tolerance = compare_outputs(expected, run.outputs)
    if not error <= tolerance:
        reads = describe_reads(run.read_weights)
        raise ParityError(
            f"the converted model's output differs from the trained model's by {error:.2g} "
            f"(relative root mean square), allowed {tolerance:.2g}, although each converted "
            f"layer agrees: {reads or _OUTSIDE}."
        )
    return Parity(
        {layer: comparison.error for layer, comparison in comparisons.items()},
        error,
        {layer: comparison.step_share for layer, comparison in comparisons.items()},
        tuple(layer for layer, comparison in comparisons.items() if comparison.error == 0.0),
        run.read_weights,
    )


@dataclass(frozen=True)
class _Comparison:
    """A layer's output and that of its conversion, for equal input.

    Attributes:
        error: largest absolute difference, divided by the largest absolute output.
        tolerance: the largest error that is allowed.
        step_share: share of elements on another step of an 8-bit grid.
        allowed_share: the largest that is allowed.
        farthest: largest number of steps between two elements.
        must_be_equal: whether both multiply integers, and nothing else.
    """

    error: float
    tolerance: float
    step_share: float
    allowed_share: float
    farthest: int
    must_be_equal: bool

    def check(self, layer: str) -> None:
        """Raise ParityError unless the outputs agree."""
        problem = None
        if not self.error <= self.tolerance:
            problem = f"relative error {self.error:.2g}, allowed {self.tolerance:.2g}"
        elif self.must_be_equal and self.error:
            problem = f"relative error {self.error:.2g}, although both multiply the same integers"
        elif self.farthest > 1 or self.step_share > self.allowed_share:
            problem = (
                f"{self.step_share:.2%} of its output lies up to {self.farthest} steps of 8 bits "
                f"away; allowed is one step in {self.allowed_share:.2%}"
            )
        if problem is not None:
            raise ParityError(
                f"layer '{layer}' computes something else after conversion: {problem}."
            )


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep cuDNN from rounding float32 operands of convolutions to TF32, which is its default.

    A convolution that absorbed a BatchNorm multiplies other numbers, whose rounding to ten bits
    would be the largest difference by far.
    """
    kinds: list[Any] = [getattr(torch.backends.cudnn, name) for name in ("conv", "rnn")]
    before = [kind.fp32_precision for kind in kinds]
    try:
        # Both, because torch refuses to answer whether TF32 is on where they differ.
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def _watch_layers(
    stack: ExitStack, trained: nn.Module, replacements: Sequence[Replacement]
) -> dict[str, _Comparison]:
    """Compare each layer's first call while `trained` runs; the returned dict fills meanwhile."""
    comparisons: dict[str, _Comparison] = {}
    results: dict[str, Any] = {}

    def run_converted(replacement: Replacement) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if replacement.name not in results and replacement.name not in comparisons:
                results[replacement.name] = replacement.layer(*args, **kwargs)

        return hook

    def compare(replacement: Replacement) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if replacement.name in results:
                expected = list(tensors_in(output))
                actual = list(tensors_in(results.pop(replacement.name)))
                trained_layer = trained.get_submodule(replacement.name)
                exact = isinstance(trained_layer, QuantizedLayer) and (
                    computes_integers(trained_layer) and not replacement.absorbed
                )
                comparisons[replacement.name] = _compare(expected, actual, must_be_equal=exact)

        return hook

    for replacement in replacements:
        layer = trained.get_submodule(replacement.name)
        handle = layer.register_forward_pre_hook(run_converted(replacement), with_kwargs=True)
        stack.callback(handle.remove)
        output_layer = trained.get_submodule(replacement.output_of)
        stack.callback(output_layer.register_forward_hook(compare(replacement)).remove)
    return comparisons


def _compare(expected: list[Tensor], actual: list[Tensor], *, must_be_equal: bool) -> _Comparison:
    error = largest_error(expected, actual)
    count = share = 0.0
    farthest = 0
    if math.isfinite(error):
        for wanted, got in zip(expected, actual, strict=True):
            # Narrower types have fewer digits than 8 bits need.
            if wanted.dtype in (torch.float32, torch.float64) and wanted.numel():
                distance = steps_apart(wanted, got)
                farthest = max(farthest, int(distance.max()))
                share += float((distance > 0).sum())
                count += wanted.numel()
    return _Comparison(
        error=error,
        tolerance=_tolerance(LAYER_TOLERANCE, *expected),
        step_share=share / max(count, 1.0),
        allowed_share=max(STEP_SHARE, 1.0 / max(count, 1.0)),
        farthest=farthest,
        must_be_equal=must_be_equal,
    )


def _tolerance(base: float, *outputs: Tensor) -> float:
    floats = [output.dtype for output in outputs if output.is_floating_point()]
    return max([base, *(_EPSILONS * torch.finfo(dtype).eps for dtype in floats)])


def compare_outputs(
    expected: list[Tensor], actual: list[Tensor], tolerance: float = MODEL_TOLERANCE
) -> tuple[float, float]:
    """Return the relative root mean square error of the floating-point outputs, and what is
    allowed.
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        return float("inf"), tolerance
    pairs = [(a, b) for a, b in zip(expected, actual, strict=True) if a.is_floating_point()]
    noise = sum(float(difference(a, b.to(a.device)).square().sum()) for a, b in pairs)
    signal = sum(float(finite(a).square().sum()) for a, _ in pairs)
    error = float((noise / max(signal, 1e-30)) ** 0.5)
    return error, _tolerance(tolerance, *(a for a, _ in pairs))
