"""Small plugins and steps by hand, for tests of the framework."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from compression_manager import CompressionManager, Plugin, PluginConfig, hookimpl
from compression_manager.testing.recording import HOOKS


@dataclass(frozen=True)
class ProbeConfig(PluginConfig):
    plugin: ClassVar[str] = "probe"


def probe(name: str = "probe", **members: Any) -> Plugin[Any]:
    """Return a plugin with the given functions as hooks; other members stay as they are."""
    body = {
        key: hookimpl(value) if key in HOOKS and inspect.isfunction(value) else value
        for key, value in members.items()
    }
    return type("Probe", (Plugin,), {"config_class": ProbeConfig, **body})(ProbeConfig(name=name))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.ones(2, 6)).square().mean()


def begin_step(manager: CompressionManager) -> CompressionManager:
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    manager.on_step_begin(0)
    return manager


def call_loss(manager: CompressionManager, loss: Any = None, **arguments: Any) -> torch.Tensor:
    inputs = torch.ones(2, 6)
    output = manager.model(inputs)
    loss = output.square().mean() if loss is None else loss
    return manager.on_after_compute_loss(inputs, output, loss, **arguments)


def finish(manager: CompressionManager) -> None:
    manager.on_step_end()
    manager.on_epoch_end()
    manager.on_train_end()


def run_step(manager: CompressionManager, step: int, *, after: bool = True) -> None:
    """One whole step by hand, without an optimizer."""
    manager.on_step_begin(step)
    call_loss(manager).backward()
    manager.on_before_optimizer_step()
    if after:
        manager.on_after_optimizer_step()
    manager.on_step_end()
