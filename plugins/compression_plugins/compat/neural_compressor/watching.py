"""Seeing the student's training calls and the optimizers' steps without the loop's help."""

from __future__ import annotations

import gc
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from compression_manager.models.hooks import ModelHooks


class Listener(Protocol):
    """Who is told."""

    def forward_begins(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The student is called in training mode."""

    def update_begins(self, optimizer: Optimizer, *, is_of_student: bool) -> None:
        """An optimizer is about to make a step."""

    def update_ended(self) -> None:
        """An optimizer of the student made a step."""


class Watch:
    """Places the hooks, and removes them.

    Those of the optimizers are torch's for all optimizers: the student's is not known yet, and
    none is asked to be registered. They hold the listener weakly, so that a training that never
    ends does not live on in them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks = ModelHooks()
        self._handles: list[RemovableHandle] = []

    def start(self, listener: Listener) -> None:
        """Tell `listener` from here on."""
        self.stop()

        def before_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module.training and torch.is_grad_enabled():
                listener.forward_begins(args, kwargs)

        self._hooks.add_forward_pre_hook(self._model, before_forward, with_kwargs=True)
        this, weak = weakref.ref(listener), weakref.ref(self)

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            told, watch = this(), weak()
            if told is not None and watch is not None:
                told.update_begins(optimizer, is_of_student=watch._holds_student(optimizer))

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            told, watch = this(), weak()
            if told is not None and watch is not None and watch._holds_student(optimizer):
                told.update_ended()

        self._handles += [
            register_optimizer_step_pre_hook(before_step),
            register_optimizer_step_post_hook(after_step),
        ]
        weakref.finalize(self, _remove, self._handles)

    def stop(self) -> None:
        """Remove the hooks."""
        self._hooks.remove_all()
        _remove(self._handles)

    def _holds_student(self, optimizer: Optimizer) -> bool:
        own = {id(parameter) for parameter in self._model.parameters()}
        return any(
            id(parameter) in own
            for group in optimizer.param_groups
            for parameter in group["params"]
        )


def schedulers_of(optimizer: Optimizer) -> list[LRScheduler]:
    """Return torch's learning-rate schedulers of an optimizer, the oldest first.

    They know the optimizer, which only knows that there is one; so they are looked for among all
    objects.
    """
    if not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return []
    return [
        item
        for item in gc.get_objects()
        if issubclass(type(item), LRScheduler) and vars(item).get("optimizer") is optimizer
    ]


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
