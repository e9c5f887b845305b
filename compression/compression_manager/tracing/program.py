"""A model as a graph, for any batch size or one, which exporters write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_map

from compression_manager.errors import ConfigError, NotExportableError
from compression_manager.models.calling import quiet_evaluation, tensors_in
from compression_manager.quantization.exporting import View, exporting
from compression_manager.quantization.tensors.memory_format import has_gaps
from compression_manager.tracing.graph_inputs import Arguments, positional_of
from compression_manager.tracing.input_sizes import BATCH, sizes_of_inputs

# Where a traced program keeps what `positional_of` returned.
PARAMETERS = "compression_manager.parameters"
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")


def batch_size(inputs: Any) -> int:
    """Return the first dimension of the first tensor that has one.

    Raises:
        ConfigError: there is no such tensor, or it is empty.
    """
    first = next((tensor for tensor in tensors_in(inputs) if tensor.dim()), None)
    if first is None or first.numel() == 0:
        raise ConfigError(
            "example_inputs of an export hold at least one sample: a tensor, a tuple or a mapping "
            "of tensors whose first dimension is the batch."
        )
    return first.shape[0]


def with_batch(inputs: Any, size: int) -> Any:
    """Return inputs of `size` samples, the given ones in turn.

    Every tensor whose first dimension is `batch_size(inputs)` has samples in it; all others stay
    as they are, unless they have gaps in memory, which compiled code would count on. A tensor
    that is given twice is two in what is returned: torch.export takes both for one input.
    """
    present = batch_size(inputs)
    order = torch.arange(size) % present
    seen: set[int] = set()

    def resize(leaf: Any) -> Any:
        if is_batch(leaf, present):
            return leaf[order.to(leaf.device)]
        if not isinstance(leaf, Tensor):
            return leaf
        again = id(leaf) in seen
        seen.add(id(leaf))
        if has_gaps(leaf):
            return leaf.contiguous()
        return leaf.clone() if again else leaf

    return tree_map(resize, dict(inputs) if isinstance(inputs, Mapping) else inputs)


def trace(
    model: nn.Module, inputs: Any, *, view: View = "operators", dynamic_batch: bool = True
) -> ExportedProgram:
    """Return the graph of `model` in eval mode.

    Args:
        model: takes `inputs` as `model_call.call_model` passes them.
        inputs: at least two samples if the batch is dynamic; torch takes one for a constant.
        view: what stands in the graph for the arithmetic of quantization; see
            `quantization.exporting.exporting`.
        dynamic_batch: whether the number of samples stays open, or all sizes are as in `inputs`.

    Raises:
        NotExportableError: torch.export cannot trace the model, or its graph depends on the
            batch size.
    """
    args, kwargs = arguments_of(inputs)
    shapes = batch_shapes(args, kwargs) if dynamic_batch else None
    try:
        with quiet_evaluation(model, restore_buffers=True), exporting(view):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        reason = brief(error)
        extent = " for any batch size" if dynamic_batch else ""
        raise NotExportableError(
            f"torch.export cannot trace the model{extent}: {reason} "
            f"{_advice(model, inputs, reason, dynamic_batch)}"
        ) from error
    # A program knows its inputs in the order of this call alone.
    program.graph_module.meta[PARAMETERS] = positional_of(model)
    return program


def _advice(model: nn.Module, inputs: Any, reason: str, dynamic_batch: bool) -> str:
    if "DynamicCache" in reason:
        return (
            "The model returns what it keeps between calls, which no file can hold; for a model "
            "of transformers set model.config.use_cache = False."
        )
    if not dynamic_batch:
        return "The model's code must not depend on values of tensors."
    return (
        "The model's code must not depend on values of tensors, nor on how many samples there are "
        f"in the first dimension of its inputs, for which that of {samples_in(model, inputs)} was "
        "taken; `export` with dynamic_batch=False keeps the sizes of the examples."
    )


def samples_in(model: nn.Module, inputs: Any) -> str:
    """Return the names of the inputs whose first dimension is taken for the samples."""
    size = batch_size(inputs)
    leaves = Arguments(*positional_of(model), {}).leaves(*arguments_of(inputs))
    return ", ".join(repr(" ".join(path)) for path, leaf in leaves.items() if is_batch(leaf, size))


def arguments_of_program(program: ExportedProgram, names: Sequence[str]) -> Arguments:
    """Return what leads to each tensor among the arguments of the model that `trace` traced.

    Args:
        program: still with its example inputs.
        names: of its inputs, in their order.
    """
    positional, variadic = program.graph_module.meta[PARAMETERS]
    args, kwargs = program.example_inputs or ((), {})
    leaves = Arguments(positional, variadic, {}).leaves(args, kwargs)
    paths = [path for path, value in leaves.items() if isinstance(value, Tensor)]
    return Arguments(
        positional,
        variadic,
        dict(zip(names, paths, strict=True)),
        dict(zip(names, sizes_of_inputs(program), strict=True)),
    )


def has_open_batch(program: ExportedProgram) -> bool:
    """Return whether a program takes any number of samples."""
    return any(BATCH in sizes for sizes in sizes_of_inputs(program))


def batch_shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the dynamic shapes, as `torch.export.export` takes them, that leave the batch open."""
    size = batch_size((args, kwargs))
    batch = Dim("batch", min=1)
    shapes: Any = ShapesCollection()
    for tensor in tensors_in((args, kwargs)):
        if is_batch(tensor, size):
            shapes[tensor] = {0: batch}
    return shapes


def brief(error: BaseException) -> str:
    """Return the kind and the first lines of an error, and those of what caused it.

    Those of exporters fill pages, and say at the top what to do with their own sources.
    """
    cause = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    text = _first_lines(error)
    return text if cause is error else f"{text} Caused by {_first_lines(cause)}"


def _first_lines(error: BaseException) -> str:
    plain = _TERMINAL_CODES.sub("", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    text = " ".join(lines[:6])
    return f"{type(error).__name__}: {text if len(text) <= 400 else text[:400] + ' ...'}"


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `model_call.call_model` calls a model with: by position and by keyword."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return inputs if isinstance(inputs, tuple) else (inputs,), {}


def is_batch(leaf: Any, size: int) -> bool:
    """Return whether `leaf` is a tensor of `size` samples."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
