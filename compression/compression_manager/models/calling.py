"""Calling a model with whatever the user's loop calls it with."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.errors import ConfigError
from compression_manager.state import capture_random_state, restore_random_state

LABEL_KEYS = frozenset({"label", "labels"})


def call_model(model: Any, inputs: Any) -> Any:
    """Call `model` as a loop would: a mapping by keyword, a tuple by position, else as it is."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def call_with_examples(model: nn.Module, inputs: Any) -> Any:
    """Call `model` with example inputs, and say so if it does not take them.

    Whoever asks looks at layers or operations, so that compiled parts run as they were written.

    Raises:
        ConfigError: the model raised an exception.
    """
    try:
        with without_compiled_code():
            return call_model(model, inputs)
    except Exception as error:
        hint = (
            " A tuple is taken for several arguments: of a pair (inputs, targets) pass the inputs."
            if isinstance(inputs, tuple)
            else ""
        )
        raise ConfigError(
            f"the model cannot be called with the example inputs ({error!r}). Pass as "
            "example_inputs what your loop calls the model with; without them, the input of the "
            f"first on_after_compute_loss is taken.{hint}"
        ) from error


@contextmanager
def without_compiled_code() -> Iterator[None]:
    """Run compiled modules as they were written within the block."""
    # Only a model that was compiled needs it; the import alone takes seconds.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def without_labels(inputs: Any) -> Any:
    """Return `inputs` without the entries `label` and `labels` if it is a mapping."""
    if isinstance(inputs, Mapping):
        return {key: value for key, value in inputs.items() if key not in LABEL_KEYS}
    return inputs


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a nesting of mappings, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name, None))


@contextmanager
def quiet_evaluation(*models: nn.Module, restore_buffers: bool = False) -> Iterator[None]:
    """Run a block in eval mode, without gradients, and leave modes and random state as found.

    Args:
        models: whose modes are restored.
        restore_buffers: whether to put back what the models count or remember in buffers, whatever
            their mode. Quantizers and observers, ours and what is derived from them, keep what they
            saw.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    random_state = capture_random_state()
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), _buffers_kept(models if restore_buffers else ()):
            yield
    finally:
        restore_random_state(random_state)
        for module, training in modes:
            module.training = training


@contextmanager
def _buffers_kept(models: Iterable[nn.Module]) -> Iterator[None]:
    kept = [
        (module, name, buffer, buffer._version, buffer.clone())
        for model in models
        for module in model.modules()
        if not _is_own(type(module))
        for name, buffer in module.named_buffers(recurse=False)
        if not buffer.is_inference()  # without a version, and not to be changed here
    ]
    try:
        yield
    finally:
        for module, name, buffer, version, value in kept:
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)
            if buffer._version != version:
                buffer.copy_(value)


def _is_own(kind: type[nn.Module]) -> bool:
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return bool(packages & {"compression_manager", "compression_plugins"})
