"""What a model is called with, found in the batches of a data loader; and going through one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compression_manager.errors import ConfigError
from compression_manager.models.calling import without_labels
from compression_manager.tracking.tracked import is_stateful


def inputs_of(batch: Any, *, source: str, otherwise: str) -> Any:
    """Return the inputs in `batch`: what `model_call.call_model` takes.

    A tensor is the input itself; a mapping loses its labels; of `(inputs, targets)` or `(inputs,)`
    the inputs are taken, which may be a tuple.

    Args:
        batch: one item of a loader.
        source: where it comes from, for the message.
        otherwise: option that handles batches of another form, for the message.

    Raises:
        ConfigError: a list or tuple of another length, of which it is unclear what the inputs are.
    """
    if isinstance(batch, (tuple, list)):
        if not 1 <= len(batch) <= 2:
            raise ConfigError(
                f"a batch of {source} has {len(batch)} parts, so that it is unclear which of them "
                "are inputs; valid are a tensor, a mapping and (inputs, targets), with a tuple of "
                f"inputs for several. For another form pass {otherwise}."
            )
        batch = batch[0]
    return dict(without_labels(batch)) if isinstance(batch, Mapping) else batch


def number_of_batches(batches: Any, limit: int | None = None) -> int | None:
    """Return how many batches there are, at most `limit`; the limit itself if that is unknown."""
    try:
        length = len(batches)
    except (TypeError, NotImplementedError):  # it has no length, or an iterable data set
        return limit
    return length if limit is None else min(length, limit)


def to_device_of(model: nn.Module, value: Any) -> Any:
    """Return `value` with its tensors moved to the model's device, if that is a single one."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return value
    device: torch.device = devices.pop()
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


@contextmanager
def undisturbed(loader: Any) -> Iterator[None]:
    """Put the loader's own generators and its state back at the end."""
    generators = [(generator, generator.get_state()) for generator in _generators(loader)]
    state = copy.deepcopy(loader.state_dict()) if is_stateful(loader) else None
    try:
        yield
    finally:
        if state is not None:
            loader.load_state_dict(state)
        for generator, value in generators:
            generator.set_state(value)


def _generators(loader: object) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = {id(value): value for value in (getattr(item, "generator", None) for item in owners)}
    return [value for value in found.values() if value is not None]
