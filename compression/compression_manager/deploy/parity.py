"""Proof that a converted model computes what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compression_manager.errors import ParityError
from compression_manager.model_call import call_model, quiet_evaluation, tensors_in

if TYPE_CHECKING:
    from compression_manager.deploy.conversion import Replacement

# A layer and its conversion get the same input and multiply the same numbers, so that only the
# order of float32 sums (and folding BatchNorm into the scale) may differ.
LAYER_TOLERANCE = 1e-4

# Over the whole model such a difference can move a value across a rounding threshold, so that a
# few elements of later layers differ by a step of their grid.
MODEL_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Parity:
    """How close a converted model is to the trained one.

    Attributes:
        layer_errors: layer -> largest absolute difference for equal input, divided by the
            largest absolute output. Layers that the input did not reach are absent.
        output_error: root mean square difference of the model's outputs, divided by the root
            mean square of the trained model's.
    """

    layer_errors: dict[str, float]
    output_error: float

    @property
    def worst_layer(self) -> str | None:
        """Name of the layer with the largest error."""
        return max(self.layer_errors, key=self.layer_errors.__getitem__, default=None)


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
            than `LAYER_TOLERANCE`, or the model's output beyond `MODEL_TOLERANCE`.
    """
    with ExitStack() as stack:
        stack.enter_context(quiet_evaluation(trained, converted))
        layer_errors = _watch_layers(stack, trained, replacements)
        expected = list(tensors_in(call_model(trained, example_inputs)))
        actual = list(tensors_in(call_model(converted, example_inputs)))
    for layer, error in layer_errors.items():
        if not error <= LAYER_TOLERANCE:
            raise ParityError(
                f"layer '{layer}' computes something else after conversion: relative error "
                f"{error:.2g}, allowed {LAYER_TOLERANCE:g}."
            )
    output_error = _output_error(expected, actual)
    if not output_error <= MODEL_TOLERANCE:
        raise ParityError(
            f"the converted model's output differs from the trained model's by {output_error:.2g} "
            f"(relative root mean square), allowed {MODEL_TOLERANCE:g}, although each converted "
            "layer agrees: the model computes something outside of its layers that differs."
        )
    return Parity(layer_errors, output_error)


def _watch_layers(
    stack: ExitStack, trained: nn.Module, replacements: Sequence[Replacement]
) -> dict[str, float]:
    """Compare each layer's first call while `trained` runs; fills the returned dict."""
    errors: dict[str, float] = {}
    results: dict[str, Tensor] = {}

    def run_converted(replacement: Replacement) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if replacement.name not in results and replacement.name not in errors:
                results[replacement.name] = replacement.layer(*args)

        return hook

    def compare(replacement: Replacement) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if replacement.name in results:
                errors[replacement.name] = _relative_error(output, results.pop(replacement.name))

        return hook

    for replacement in replacements:
        layer = trained.get_submodule(replacement.name)
        stack.callback(layer.register_forward_pre_hook(run_converted(replacement)).remove)
        output_layer = trained.get_submodule(replacement.output_of)
        stack.callback(output_layer.register_forward_hook(compare(replacement)).remove)
    return errors


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    difference = (expected.double() - actual.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=1e-30))


def _output_error(expected: list[Tensor], actual: list[Tensor]) -> float:
    if len(expected) != len(actual) or any(
        a.shape != b.shape for a, b in zip(expected, actual, strict=True)
    ):
        return float("inf")
    pairs = [
        (a.double(), b.double())
        for a, b in zip(expected, actual, strict=True)
        if a.is_floating_point()
    ]
    noise = sum(float((a - b).square().sum()) for a, b in pairs)
    signal = sum(float(a.square().sum()) for a, _ in pairs)
    return float((noise / max(signal, 1e-30)) ** 0.5)
