"""Tracing a module with torch.export for what a loop calls it with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compression_manager.errors import CompressionError, ConfigError, NotExportableError
from compression_manager.models.calling import tensors_in


def export_program(
    module: nn.Module, inputs: Any, *, dynamic_batch: bool
) -> torch.export.ExportedProgram:
    """Return `module` as a graph of torch.export that is called as the loop calls the module.

    Args:
        module: in the mode in which it shall be traced.
        inputs: a tensor; a tuple, for positional arguments; or a mapping, for keywords.
        dynamic_batch: let dimension 0 vary in every tensor in which it is as long as in the
            first.

    Raises:
        NotExportableError: torch.export cannot trace the module.
        ConfigError: the batch shall vary and the inputs hold a single row.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
        module = _with_named_keywords(module, list(kwargs))
    else:
        args = inputs if isinstance(inputs, tuple) else (inputs,)
    shapes = _batch_shapes(module, args, kwargs) if dynamic_batch else None
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    except CompressionError:
        raise
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise NotExportableError(
            f"torch.export cannot trace the model ({type(error).__name__}: {first_line}); its "
            "control flow must not depend on values, nor with dynamic_batch=True on the number of "
            "examples."
        ) from error


def _batch_shapes(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    tensors = [tensor for tensor in tensors_in((args, kwargs)) if tensor.dim() > 0]
    size = tensors[0].shape[0] if tensors else 0
    if size < 2:
        raise ConfigError(
            "example_inputs must hold at least 2 examples, because torch.export takes a size of 0 "
            f"or 1 for a constant, got {size}; or pass dynamic_batch=False."
        )
    shapes = torch.export.ShapesCollection()
    batch = torch.export.Dim("batch")
    for tensor in tensors:
        if tensor.shape[0] == size:
            shapes[tensor] = {0: batch}
    by_name: dict[str, Any] = shapes.dynamic_shapes(module, args, kwargs)
    return by_name


def _with_named_keywords(module: nn.Module, names: list[str]) -> nn.Module:
    """Return a module that calls `module` by keyword and whose signature names the keywords.

    torch.export (2.13) takes no dynamic shapes for what `**kwargs` collects.
    """

    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = module

        def forward(self, **kwargs: Any) -> Any:
            return self.teacher(**kwargs)

    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    ByKeyword.forward.__signature__ = inspect.Signature([own, *keywords])  # type: ignore[attr-defined]  # read by inspect, unknown to typeshed
    return ByKeyword()
