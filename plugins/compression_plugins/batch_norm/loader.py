"""Going through a data loader without leaving a trace in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

from compression_manager.errors import ConfigError
from compression_manager.tracking import is_stateful


def check_loader(loader: object, *, plugin: str) -> None:
    """Raise ConfigError unless there is a loader, and one that can be gone through again."""
    if loader is None:
        raise ConfigError(
            f"plugin '{plugin}' needs the training batches once more at the end of training; call "
            "manager.track(dataloader=loader) or manager.on_train_begin(loader), or give "
            "BatchNormReestimationConfig(dataloader=loader)."
        )
    if isinstance(loader, Iterator):
        raise ConfigError(
            f"plugin '{plugin}' got a {type(loader).__name__}, which yields its batches once; "
            "give the data loader itself."
        )
    if isinstance(loader, Sized) and len(loader) == 0:
        raise ConfigError(f"plugin '{plugin}': the {type(loader).__name__} holds no batch.")


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
