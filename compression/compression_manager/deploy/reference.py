"""What a converted model returns, and how far something that runs in its place is from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.deploy.parity import compare_outputs, full_precision
from compression_manager.errors import ConfigError, NotExportableError, ParityError
from compression_manager.models.calling import (
    call_model,
    call_with_examples,
    quiet_evaluation,
    tensors_in,
)
from compression_manager.quantization.integer.selection import reference_arithmetic
from compression_manager.quantization.layers import QuantizedLayer
from compression_manager.tracing.program import batch_size, brief


def require_converted(model: object, owner: str) -> nn.Module:
    """Return `model` if it can be deployed.

    Raises:
        ConfigError: it is no module, or a layer is still that of training.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{owner} takes a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            raise ConfigError(
                f"{owner} takes a converted model; layer '{name}' is still that of training. Pass "
                "what manager.convert() returns."
            )
    return model


@dataclass(frozen=True)
class Reference:
    """What the converted model returns for some inputs.

    Sums of integers are exact and those of float32 rounded, so that a value between two integers
    may fall on either. What runs in the model's place has one arithmetic or the other, and is
    compared with the model in the same one.

    Attributes:
        inputs: as `model_call.call_model` passes them.
        output: as the model returned it.
        in_float32: what the functions of `arithmetic` return in the place of integer kernels.
        overwrites: whether the model itself changes its inputs.
    """

    inputs: Any
    output: Any
    in_float32: Any
    overwrites: bool

    @classmethod
    def of(cls, model: nn.Module, inputs: Any) -> Reference:
        """Run `model`, which stays as it is.

        Raises:
            ConfigError: it does not take `inputs`.
        """
        with full_precision(), quiet_evaluation(model, restore_buffers=True):
            before = _copies(inputs)
            output = call_with_examples(model, inputs)
            overwrites = _differ(before, inputs)
            with reference_arithmetic():
                return cls(inputs, output, call_with_examples(model, inputs), overwrites)

    def compare(self, run: Callable[..., Any], tolerance: float, name: str) -> float:
        """Return the relative error (root mean square) of what `run` returns for the inputs.

        Args:
            run: called as the model is.
            tolerance: largest error that is allowed; more in bfloat16 and float16.
            name: what it is, for messages.

        Raises:
            NotExportableError: `run` fails.
            ParityError: it returns something else.
        """
        error, allowed = self.measure(run, tolerance, name)
        if not error <= allowed:
            raise ParityError(
                f"{self._where(name)} returns other outputs than the converted model: relative "
                f"error {error:.2g} (root mean square), allowed {allowed:.2g}."
            )
        return error

    def measure(self, run: Callable[..., Any], tolerance: float, name: str) -> tuple[float, float]:
        """Return the error of what `run` returns, and what is allowed.

        Raises:
            NotExportableError: `run` fails.
            ParityError: it returns tensors of other types and shapes, or changes the inputs, which
                are then put right.
        """
        where, before = self._where(name), _copies(self.inputs)
        try:
            with full_precision():
                actual = list(tensors_in(call_model(run, self.inputs)))
        except Exception as error:
            raise NotExportableError(
                f"{where} fails, unlike the converted model: {brief(error)}"
            ) from error
        if not self.overwrites and _differ(before, self.inputs):
            for item, copy in zip(tensors_in(self.inputs), before, strict=True):
                item.copy_(copy)
            raise ParityError(f"{where} overwrites its inputs, unlike the converted model.")
        expected = list(tensors_in(self.output))
        wanted, got = _listed(expected), _listed(actual)
        if wanted != got:
            raise ParityError(f"{where} returns {got} instead of {wanted}.")
        in_float32 = list(tensors_in(self.in_float32))
        return min(_difference(item, actual, tolerance) for item in (expected, in_float32))

    def _where(self, name: str) -> str:
        return f"{name} at batch size {batch_size(self.inputs)}"


def _copies(inputs: Any) -> list[Tensor]:
    return [item.detach().clone() for item in tensors_in(inputs)]


def _differ(before: list[Tensor], inputs: Any) -> bool:
    """Return whether inputs are others than their copies; what is no number equals itself."""
    return not all(
        torch.equal(copy, item) or torch.allclose(copy, item, rtol=0, atol=0, equal_nan=True)
        for copy, item in zip(before, tensors_in(inputs), strict=True)
    )


def _difference(
    expected: list[Tensor], actual: list[Tensor], tolerance: float
) -> tuple[float, float]:
    """Return the largest difference of outputs of equal types and shapes, and what is allowed."""
    difference, allowed = compare_outputs(expected, actual, tolerance)
    for one, other in zip(expected, actual, strict=True):
        if not one.is_floating_point() and one.numel():
            difference = max(difference, float((one.cpu() != other.cpu()).double().mean()))
    return difference, allowed


def _listed(outputs: list[Tensor]) -> str:
    """Return types and shapes."""
    kinds = [(str(item.dtype).removeprefix("torch."), tuple(item.shape)) for item in outputs]
    return ", ".join(f"{dtype} {shape}" for dtype, shape in kinds) or "no tensor"
