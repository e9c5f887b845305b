"""A converted model compiled by torch.compile, with 8-bit kernels where they are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compression_manager.deploy.parity import MODEL_TOLERANCE
from compression_manager.deploy.progress import progress
from compression_manager.deploy.reference import Reference, require_converted
from compression_manager.errors import NotExportableError
from compression_manager.models.calling import call_model, tensors_in, without_labels
from compression_manager.tracing.program import batch_size, brief, trace, with_batch


class CompiledModel:
    """What `compile` returns; called as the model is, without gradients.

    Attributes:
        layers: layers with 8-bit weights and inputs that kernels could compute.
        int8_kernels: those of them that run on 8-bit kernels; the others, and all layers where
            the processor's kernels overflow, compute with float32 weights.
        output_error: relative error (root mean square) of the outputs for the example inputs,
            compared with the converted model's; None until they are compared.
    """

    layers: int
    int8_kernels: int
    output_error: float | None

    def __init__(self, run: Callable[..., Any], layers: int) -> None:
        self._run = run
        self.layers = layers
        self.int8_kernels = 0
        self.output_error = None
        self._compiled: set[tuple[object, ...]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns; arguments as the model's.

        A batch size of one, and another memory format, are compiled anew at their first call unless
        the examples had them; all other batch sizes share one program.
        """
        from compression_manager.integrations.inductor import compiling

        # Choosing the compiler's settings takes longer than some models do.
        tensors = tensors_in((args, kwargs))
        kind = tuple((item.shape, item.stride(), item.dtype, item.device) for item in tensors)
        if kind in self._compiled:
            with torch.no_grad():
                return self._run(*args, **kwargs)
        with compiling():
            output = self._run(*args, **kwargs)
        self._compiled.add(kind)
        return output

    def __repr__(self) -> str:
        kernels = f"{self.int8_kernels} of {self.layers} layers on 8-bit kernels"
        if self.output_error is None:
            return f"CompiledModel({kernels})"
        return f"CompiledModel({kernels}, relative error of the outputs {self.output_error:.1e})"


def compile(model: nn.Module, example_inputs: Any) -> CompiledModel:
    """Compile a converted model with torch.compile, and compare it with the model.

    The weights are frozen into the code: linear layers and convolutions with int8 weights become
    oneDNN's 8-bit kernels if the processor computes these exactly (with VNNI or better); else, and
    in all other layers, weights are kept as float32. Takes half a minute and more; progress is
    shown on stderr. Needs a C++ compiler.

    Args:
        model: what `convert` returned or `deploy.load` loaded; stays as it is.
        example_inputs: as for `export`. Only the batch size may be another one later.

    Raises:
        ConfigError: a model that was not converted, or inputs that it does not take.
        NotExportableError: the model cannot be traced or compiled.
        ParityError: the compiled model computes something else.
    """
    require_converted(model, "compile")
    inputs = without_labels(example_inputs)
    reference = Reference.of(model, inputs)
    with progress("compiling with Inductor", total=3) as begin:
        begin("tracing")
        compiled = traced_for_compiler(model, inputs)
        begin("compiling")
        compile_now(compiled, inputs)
        begin("comparing")
        compiled.output_error = reference.compare(compiled, MODEL_TOLERANCE, "the compiled model")
    return compiled


def traced_for_compiler(model: nn.Module, inputs: Any) -> CompiledModel:
    """Return the model, to be compiled by its first call."""
    from compression_manager.integrations.inductor import (
        compile_program,
        int8_kernels_are_exact,
    )

    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors_in(inputs))
    int8 = on_cpu and int8_kernels_are_exact()
    traced = with_batch(inputs, max(2, batch_size(inputs)))
    program = trace(model, traced, view="eight bits" if int8 else "formulas")
    return CompiledModel(*compile_program(program))


def compile_now(compiled: CompiledModel, inputs: Any) -> None:
    """Call a traced model for the first time.

    Raises:
        NotExportableError: it cannot be compiled.
    """
    from compression_manager.integrations.inductor import counting_kernels, open_batch

    try:
        with counting_kernels() as count:
            call_model(compiled, open_batch(with_batch(inputs, batch_size(inputs))))
    except Exception as error:
        raise NotExportableError(f"torch.compile fails on the model: {brief(error)}") from error
    compiled.int8_kernels = count()
