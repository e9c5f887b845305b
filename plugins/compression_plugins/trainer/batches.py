"""The loader's contract: what a batch consists of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from compression_manager.errors import ConfigError, suggest
from compression_manager.models.calling import LABEL_KEYS, without_labels
from compression_manager.state import capture_random_state, restore_random_state
from compression_manager.tracking.tracked import is_iterable

SAMPLE_IDS = "sample_ids"


@dataclass(frozen=True)
class Batch:
    """The parts of one item of a loader.

    Attributes:
        inputs: what the model is called with: a tensor, a tuple or a mapping.
        targets: what the criterion compares the output with.
        sample_ids: identities of the samples, or None.
    """

    inputs: Any
    targets: Any
    sample_ids: Any = None


def unpack(item: Any, *, source: str, device: torch.device | None) -> Batch:
    """Return the parts of `item`, inputs and targets on `device`.

    `(inputs, targets)`, `(inputs, targets, sample_ids)`, or a mapping with `labels` and perhaps
    `sample_ids`. A list of inputs (what torch's collation makes of a tuple) becomes a tuple.

    Args:
        item: one batch.
        source: the loader's name, for messages.
        device: where the student is; None leaves everything where it is.

    Raises:
        ConfigError: it has another form.
    """
    batch = _from_mapping(item, source) if isinstance(item, Mapping) else _from_tuple(item, source)
    inputs = tuple(batch.inputs) if isinstance(batch.inputs, list) else batch.inputs
    return Batch(_moved(inputs, device), _moved(batch.targets, device), batch.sample_ids)


def check_loader(loader: object, name: str) -> None:
    """Raise ConfigError unless `loader` can be gone through again and again, and is not empty."""
    if not is_iterable(loader):
        raise ConfigError(f"{name} takes a data loader, got {type(loader).__name__}.")
    if isinstance(loader, Iterator):
        raise ConfigError(
            f"{name} is a {type(loader).__name__}, which ends after one epoch; pass something that "
            "begins anew each time, such as a torch.utils.data.DataLoader or a list of batches."
        )
    try:
        length = len(loader)  # type: ignore[arg-type]  # raises, caught
    except (TypeError, NotImplementedError):
        return
    if length == 0:
        raise _empty(name)


def first_batch(loader: Any, *, source: str, device: torch.device | None) -> Batch:
    """Return the loader's first batch; the random state stays as it was.

    Raises:
        ConfigError: there is none, or it has an unknown form.
    """
    random_state = capture_random_state()
    try:
        for item in loader:
            return unpack(item, source=source, device=device)
    finally:
        restore_random_state(random_state)
    raise _empty(source)


def _from_mapping(item: Mapping[Any, Any], source: str) -> Batch:
    inputs = dict(without_labels(item))
    targets = [item[key] for key in sorted(LABEL_KEYS, reverse=True) if key in item]
    if not targets:
        raise ConfigError(
            f"a batch of {source} is a mapping without the key 'labels', which holds the targets; "
            f"{suggest('labels', map(str, item))}"
        )
    return Batch(inputs, targets[0], inputs.pop(SAMPLE_IDS, None))


def _from_tuple(item: Any, source: str) -> Batch:
    if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise ConfigError(
            f"a batch of {source} is a {type(item).__name__}{size}; valid are (inputs, targets), "
            "(inputs, targets, sample_ids) and a mapping with 'labels', where several inputs of "
            "the model are a tuple of their own: ((first, second), targets)."
        )
    return Batch(*item)


def _moved(value: Any, device: torch.device | None) -> Any:
    if device is None:
        return value
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def _empty(name: str) -> ConfigError:
    return ConfigError(f"{name} is empty; check the data set's size, batch_size and drop_last.")
