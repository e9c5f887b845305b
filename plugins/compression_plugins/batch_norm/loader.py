"""Checking a data loader that is gone through once more."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from compression_manager.errors import ConfigError


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
