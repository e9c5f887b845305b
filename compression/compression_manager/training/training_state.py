"""Everything that a resumed training needs, collected into one tree and put back from it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compression_manager.context import Context
from compression_manager.errors import CheckpointError, CheckpointMismatchError, CompressionError
from compression_manager.plugin import Plugin
from compression_manager.plugin_host.loading import naming
from compression_manager.state import capture_random_state, restore_random_state
from compression_manager.tracking.loader_position import LoaderPosition
from compression_manager.training.lifecycle import Lifecycle
from compression_manager.training.position import Position
from compression_manager.training.state_checks import (
    check_kinds,
    check_model,
    check_names,
    check_options,
    check_parameters,
    gradients_of,
)

STATE_VERSION = 1


class TrainingState:
    """The parts of one manager that make up its state.

    Attributes:
        loader: where the data loader of the present epoch stands.
        is_resumed: a state was put back and no epoch has begun since.
        evaluations: one entry per evaluation: epoch, global_step and metrics.
    """

    def __init__(
        self, context: Context, plugins: Sequence[Plugin[Any]], lifecycle: Lifecycle
    ) -> None:
        self.loader = LoaderPosition(context.tracked)
        self.is_resumed = False
        self.evaluations: list[dict[str, Any]] = []
        self._epoch = 0
        self._step = 0
        self._context = context
        self._plugins = plugins
        self._lifecycle = lifecycle

    @property
    def position(self) -> Position:
        """Where a run that is saved now would continue; a step counts from its loss on."""
        lifecycle = self._lifecycle
        return Position(
            self._epoch,
            self._step + lifecycle.step_is_done,
            self._context.global_step + lifecycle.uncounted_updates,
        )

    def move_to(self, epoch: int, step: int) -> None:
        """Set the epoch to continue in and the number of its batches that are consumed."""
        self._epoch, self._step = epoch, step

    def collect(self) -> dict[str, Any]:
        """Return the state as nested dicts; its tensors are the live ones, not copies.

        Raises:
            LifecycleError: the work of a step is under way.
            PluginError: a plugin cannot say what its state is.
        """
        self._lifecycle.check_can_save()
        context, position = self._context, self.position
        loader = self.loader.state_dict()
        self.loader.warn_if_lost(loader, consumed=position.step)
        accumulating = self._lifecycle.accumulating
        return {
            "version": STATE_VERSION,
            "epoch": position.epoch,
            "step": position.step,
            "global_step": position.global_step,
            "recipe": dict(context.recipe),
            "model": context.model.state_dict(),
            # Gradients of an unfinished accumulation are part of the next update.
            "accumulating": accumulating,
            "gradients": gradients_of(context.model) if accumulating else {},
            "tracked_gradients": self._tracked_gradients() if accumulating else {},
            "plugins": self._plugin_states(),
            "tracked": context.tracked.state_dict(),
            "objects": context.tracked.describe(context.model),
            "loader": loader,
            "random": capture_random_state(),
            "evaluations": list(self.evaluations),
            "stop": {"should_stop": context.should_stop, "reason": context.stop_reason},
        }

    def apply(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; all of it or nothing. Its tensors may come into use as they are.

        Raises:
            CheckpointError: this is no training state, or one of another version.
            CheckpointMismatchError: it belongs to another model or composition.
        """
        self._check(state)
        before = {
            "model": copy.deepcopy(self._context.model.state_dict()),
            "gradients": gradients_of(self._context.model),
            "tracked_gradients": self._tracked_gradients(),
            "plugins": copy.deepcopy(self._plugin_states()),
            "tracked": copy.deepcopy(self._context.tracked.state_dict()),
        }
        attempted = 0
        try:
            for part, put in self._parts(state):
                attempted += 1
                with _fitting(part):
                    put()
            restore_random_state(state["random"])
        except BaseException as error:
            self._roll_back(before, attempted, error)
            raise
        self.loader.load_state_dict(state["loader"], consumed=state["step"])
        self.evaluations = list(state["evaluations"])
        self.move_to(state["epoch"], state["step"])
        self.is_resumed = True
        self._lifecycle.resume(accumulating=state["accumulating"])
        self._context.epoch = state["epoch"]
        self._context.global_step = state["global_step"]
        self._context.should_stop = state["stop"]["should_stop"]
        self._context.stop_reason = state["stop"]["reason"]

    def _parts(self, state: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yield the name of each part of a state and what puts it back."""
        model, tracked = self._context.model, self._context.tracked
        yield "the model", functools.partial(model.load_state_dict, state["model"])
        gradients = state.get("tracked_gradients", {})  # earlier releases did not keep them
        # One of these modules may wrap the model, whose own gradients therefore come last.
        for name, module in tracked.modules.items():
            put = functools.partial(_set_gradients, module, gradients.get(name, {}))
            yield f"the gradients of '{name}'", put
        yield "the gradients", functools.partial(_set_gradients, model, state["gradients"])
        for plugin in self._plugins:
            own = state["plugins"].get(plugin.name, {})
            yield f"plugin '{plugin.name}'", functools.partial(plugin.load_state_dict, own)
        for name, value in state["tracked"].items():
            yield f"'{name}'", functools.partial(tracked[name].load_state_dict, value)

    def _roll_back(self, before: Mapping[str, Any], attempted: int, error: BaseException) -> None:
        for _, (part, put) in zip(range(attempted), self._parts(before), strict=False):
            try:
                put()
            except Exception as failure:
                error.add_note(f"{part} could not be put back as it was: {failure!r}")

    def _tracked_gradients(self) -> dict[str, dict[str, Tensor]]:
        modules = self._context.tracked.modules
        return {name: gradients_of(module) for name, module in modules.items()}

    def _plugin_states(self) -> dict[str, dict[str, Any]]:
        states = {}
        for plugin in self._plugins:
            with naming(plugin, "state_dict"):
                states[plugin.name] = plugin.state_dict()
        return states

    def _check(self, state: Mapping[str, Any]) -> None:
        check_kinds(state)
        if state["version"] != STATE_VERSION:
            raise CheckpointError(
                f"the training state has version {state['version']}; this release reads "
                f"version {STATE_VERSION}."
            )
        model = self._context.model
        check_model(model, state["model"])
        check_names(
            state,
            gradients=set(dict(model.named_parameters())),
            tracked_gradients={
                name: set(dict(module.named_parameters()))
                for name, module in self._context.tracked.modules.items()
            },
            plugins=self._plugin_states(),
            tracked=set(self._context.tracked.state_dict()),
        )
        # Earlier releases did not describe them.
        saved, own = state.get("objects", {}), self._context.tracked.describe(model)
        check_options(saved, own)
        check_parameters(saved, own)
        LoaderPosition.check_state(state["loader"], consumed=state["step"])


@contextmanager
def _fitting(part: str) -> Iterator[None]:
    try:
        yield
    except CompressionError:
        raise
    except Exception as error:
        raise CheckpointMismatchError(
            f"the checkpoint does not fit {part}: {type(error).__name__}: {error}"
        ) from error


def _set_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        gradient = gradients.get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device)
