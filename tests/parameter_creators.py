"""A plugin that creates parameters, and a step that trains them."""

from __future__ import annotations

from typing import Any

import torch
import torch.optim.lr_scheduler as lr
from torch import nn

from probes import call_loss, probe


def creator(count: int = 2, **options: Any) -> Any:
    """Return a plugin that registers `count` parameters in the model, each used in forward."""

    def prepare_model(self: Any, context: Any) -> None:
        created = {f"extra_{index}": nn.Parameter(torch.ones(())) for index in range(count)}
        for name, parameter in created.items():
            context.model.register_parameter(name, parameter)
        context.model_hooks.add_forward_hook(
            context.model, lambda model, args, output: output * sum(created.values())
        )
        context.add_parameters(created, owner=self.name, **options)

    return probe("creator", prepare_model=prepare_model)


def extras(model: nn.Module) -> list[nn.Parameter]:
    return [value for name, value in model.named_parameters() if name.startswith("extra")]


def step(manager: Any, optimizer: Any, number: int, scheduler: Any = None) -> None:
    manager.on_step_begin(number)
    call_loss(manager).backward()
    manager.on_before_optimizer_step()
    optimizer.step()
    manager.on_after_optimizer_step()
    optimizer.zero_grad()
    if scheduler is not None:
        scheduler.step(*((1.0,) if isinstance(scheduler, lr.ReduceLROnPlateau) else ()))
    manager.on_step_end()
