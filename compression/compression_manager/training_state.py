"""Everything that a resumed training needs, collected into one tree and put back from it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from compression_manager.context import Context
from compression_manager.errors import CheckpointError, CheckpointMismatchError, suggest
from compression_manager.lifecycle import Lifecycle
from compression_manager.loops import LoaderPosition
from compression_manager.plugin import Plugin
from compression_manager.position import Position
from compression_manager.state import capture_random_state

STATE_VERSION = 1
_KEYS = frozenset(
    {"version", "epoch", "step", "global_step", "recipe", "model", "gradients", "plugins"}
    | {"tracked", "loader", "random", "evaluations", "stop"}
)


class TrainingState:
    """The parts of one manager that make up its state.

    Attributes:
        position: where a run that is saved now would continue.
        loader: where the data loader of the present epoch stands.
        evaluations: one entry per evaluation: epoch, global_step and metrics.
    """

    def __init__(
        self, context: Context, plugins: Sequence[Plugin[Any]], lifecycle: Lifecycle
    ) -> None:
        self.position = Position()
        self.loader = LoaderPosition()
        self.evaluations: list[dict[str, Any]] = []
        self._context = context
        self._plugins = plugins
        self._lifecycle = lifecycle

    def collect(self) -> dict[str, Any]:
        """Return the state as nested dicts; its tensors are the live ones, not copies."""
        context = self._context
        return {
            "version": STATE_VERSION,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "global_step": context.global_step,
            "recipe": dict(context.recipe),
            "model": context.model.state_dict(),
            # Gradients of an unfinished accumulation are part of the next update.
            "gradients": _gradients(context.model) if self._lifecycle.accumulating else {},
            "plugins": {plugin.name: plugin.state_dict() for plugin in self._plugins},
            "tracked": context.tracked.state_dict(),
            "loader": self.loader.state_dict(),
            "random": capture_random_state(),
            "evaluations": list(self.evaluations),
            "stop": {"should_stop": context.should_stop, "reason": context.stop_reason},
        }

    def apply(self, state: Mapping[str, Any]) -> None:
        """Put `state` back, apart from the random state; all of it or nothing.

        Raises:
            CheckpointError: this is no training state, or one of another version.
            CheckpointMismatchError: it belongs to another model or composition.
        """
        self._check(state)
        before = copy.deepcopy(self.collect())
        try:
            self._put_back(state)
        except Exception as error:
            self._put_back(before)
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointMismatchError(
                f"the checkpoint does not fit: {error} Nothing was changed."
            ) from error

    def _put_back(self, state: Mapping[str, Any]) -> None:
        context = self._context
        context.model.load_state_dict(state["model"])
        for name, parameter in context.model.named_parameters():
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        for plugin in self._plugins:
            plugin.load_state_dict(state["plugins"].get(plugin.name, {}))
        for name, value in state["tracked"].items():
            context.tracked[name].load_state_dict(value)
        self.loader.load_state_dict(
            state["loader"], consumed=state["step"], loader=context.tracked.get("dataloader")
        )
        self.evaluations = list(state["evaluations"])
        self.position = Position(state["epoch"], state["step"], state["global_step"])
        self._lifecycle.resume_accumulation(bool(state["gradients"]))
        context.epoch = state["epoch"]
        context.global_step = state["global_step"]
        context.should_stop = state["stop"]["should_stop"]
        context.stop_reason = state["stop"]["reason"]

    def _check(self, state: Mapping[str, Any]) -> None:
        missing = sorted(_KEYS - set(state))
        if missing:
            raise CheckpointError(
                f"this is no training state of compression_manager: it lacks {', '.join(missing)}."
            )
        if state["version"] != STATE_VERSION:
            raise CheckpointError(
                f"the training state has version {state['version']}; this release reads "
                f"version {STATE_VERSION}."
            )
        check_model(self._context.model, state["model"])
        _check_plugins(self._plugins, state["plugins"])
        _check_tracked(self._context, state["tracked"])


def check_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raise CheckpointMismatchError unless names and shapes are those of `model`."""
    own = model.state_dict()
    for name in own:
        if name not in saved:
            raise CheckpointMismatchError(
                f"the checkpoint holds no '{name}', which the model has; {suggest(name, saved)}"
            )
    for name, value in saved.items():
        if name not in own:
            raise CheckpointMismatchError(
                f"the checkpoint holds '{name}', which the model lacks; {suggest(name, own)}"
            )
        if own[name].shape != value.shape:
            raise CheckpointMismatchError(
                f"'{name}' has shape {tuple(value.shape)} in the checkpoint and "
                f"{tuple(own[name].shape)} in the model."
            )


def _gradients(model: nn.Module) -> dict[str, Any]:
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _check_plugins(plugins: Sequence[Plugin[Any]], saved: Mapping[str, Any]) -> None:
    own = {plugin.name: plugin.state_dict() for plugin in plugins}
    for name, state in saved.items():
        if state and name not in own:
            raise CheckpointMismatchError(
                f"the checkpoint holds state of plugin '{name}', which is not in the present "
                f"composition; {suggest(name, own)}"
            )
    for name, state in own.items():
        if state and not saved.get(name):
            raise CheckpointMismatchError(
                f"plugin '{name}' keeps state, but the checkpoint was written without it; "
                f"{suggest(name, saved)}"
            )


def _check_tracked(context: Context, saved: Mapping[str, Any]) -> None:
    own = context.tracked.state_dict()
    for name in saved:
        if name not in own:
            raise CheckpointMismatchError(
                f"the checkpoint holds the state of '{name}'; register it with "
                f"manager.track({name}=...) before resuming."
            )
    for name in own:
        if name not in saved:
            raise CheckpointMismatchError(
                f"'{name}' is tracked, but the checkpoint was written without it; "
                f"{suggest(name, saved)}"
            )
