"""The manager whose hooks the user's loop calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from compression_manager.configuration.checks import as_path
from compression_manager.context import Context
from compression_manager.errors import CheckpointError, ConfigError
from compression_manager.inspection import Inspection
from compression_manager.plugin import Plugin
from compression_manager.plugin_host.dispatch import Hooks
from compression_manager.plugin_host.loading import register, required_hooks
from compression_manager.services import Services
from compression_manager.state import find_checkpoint, read_checkpoint
from compression_manager.state.files import is_temporary
from compression_manager.training.lifecycle import Lifecycle
from compression_manager.training.position import Position
from compression_manager.training.state_checks import (
    changed_classes,
    changed_options,
    check_kinds,
    check_model,
)
from compression_manager.training.training_state import TrainingState


class CompressionManager(Inspection):
    """Sends each event of a training loop to the plugins; made by `prepare_compression`.

    The hooks are called in the order of the loop in `compression_manager.hookspecs`; a hook out
    of order raises LifecycleError. An exception in a plugin is a PluginError that names the
    plugin and the hook, unless it is one of the framework's own errors.
    """

    def __init__(self, context: Context, plugins: Sequence[Plugin[Any]]) -> None:
        pluggy_manager = register(plugins)
        lifecycle = Lifecycle(required_hooks(plugins))
        state = TrainingState(context, plugins, lifecycle)
        super().__init__(Hooks(pluggy_manager.hook), context, lifecycle, state)
        self._plugins = tuple(plugins)
        context.connect(Services(pluggy_manager), self.state_dict)

    @property
    def should_stop(self) -> bool:
        """Whether a plugin asked the loop to end."""
        return self._context.should_stop

    @property
    def stop_reason(self) -> str | None:
        """Why `should_stop` is true, in words."""
        return self._context.stop_reason

    @property
    def position(self) -> Position:
        """Where training would continue if it were saved now."""
        return self._state.position

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One entry per `on_after_eval`: `epoch`, `global_step` and `metrics`."""
        return list(self._state.evaluations)

    def shape_model(self) -> None:
        """Let plugins check the composition, then change the model; `prepare_compression` does."""
        self._hooks.validate_composition(context=self._context, plugins=self._plugins)
        self._hooks.prepare_model(context=self._context)

    # Setting up ------------------------------------------------------------------------------

    def track(
        self,
        *,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        dataloader: Any = None,
        **others: Any,
    ) -> None:
        """Register what checkpoints must hold; anything with state_dict and load_state_dict.

        Parameters that plugins created join the optimizer as a group of their own.

        Raises:
            ConfigError: an object has no such methods, or is the model; or the optimizer cannot
                take the plugins' parameters. None is registered.
        """
        named = {
            "optimizer": optimizer,
            "scheduler": scheduler,
            "scaler": scaler,
            "dataloader": dataloader,
        }
        self._lifecycle.check_open("track")
        given = {name: value for name, value in named.items() if value is not None}
        objects = {**given, **others}
        for name, value in objects.items():
            if value is self.model:
                raise ConfigError(
                    f"track({name}=...) got the model itself, which is part of every checkpoint."
                )
        tracked = self._context.tracked
        before = tracked.optimizers
        self._context.parameter_groups.track(objects)
        replaced = {name: before[name] for name in objects if name in before}
        tracked.warn_of_lost(replaced, self.model)

    def resume(self, directory: str | Path, *, missing_ok: bool = False) -> Position:
        """Restore everything from a checkpoint; call it after `track`, before training.

        Args:
            directory: one checkpoint, or the folder of several, whose newest is taken.
            missing_ok: return the start position if there is no checkpoint yet.

        Returns:
            Where to continue; `epochs(n)` does so by itself.

        Warns if options of the plugins, or classes of what is tracked, differ from those of the
        checkpoint.

        Raises:
            CheckpointError: there is none, it is corrupt, or it belongs to something else.
            LifecycleError: training has begun.
        """
        self._lifecycle.check_before_training("resume")
        folder = as_path("resume", directory)
        try:
            path = find_checkpoint(folder)
        except CheckpointError as error:
            if _has_content(folder):
                raise
            if missing_ok:
                return self.position
            hint = "resume(..., missing_ok=True) begins a new training instead."
            error.args = (f"{error} {hint}", *error.args[1:])
            raise
        state = read_checkpoint(path)
        try:
            self._restore(state)
        except CheckpointError as error:
            error.args = (f"{path}: {error}", *error.args[1:])
            raise
        changes = changed_options(state["recipe"], self._context.recipe)
        described = self._context.tracked.describe(self.model)
        changes += changed_classes(state.get("objects", {}), described)
        if changes:
            warnings.warn(
                f"{path} was written with other options or objects, so that training goes on "
                f"otherwise than without the interruption: {'; '.join(sorted(changes))}.",
                stacklevel=2,
            )
        return self.position

    def load_weights(
        self, directory: str | Path, *, which: Literal["latest", "best"] = "latest"
    ) -> None:
        """Load only the model's tensors from a checkpoint, for example the best one.

        Args:
            directory: one checkpoint, or the folder of several.
            which: of several, the `latest` or the `best`.

        Raises:
            CheckpointError: there is none, it is corrupt, or it belongs to another model.
        """
        folder = as_path("load_weights", directory)
        state = read_checkpoint(find_checkpoint(folder, which=which))
        check_kinds(state)
        check_model(self.model, state["model"])
        self.model.load_state_dict(state["model"])

    def state_dict(self) -> dict[str, Any]:
        """Return the whole training state as nested dicts of plain values and live tensors.

        Within a step, call it when the step's work is done, after `optimizer.step()`: the state
        then counts the step, and a resumed run continues with the next one. Plugins get what was
        published so far before they are asked for their state.

        Raises:
            LifecycleError: the step has no loss yet, or its update is under way.
        """
        self._lifecycle.check_can_save()
        self._deliver_metrics()
        return self._state.collect()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; all of it, or nothing if it does not fit.

        The state is copied, so that it can be loaded again.

        Raises:
            CheckpointError: it is no training state, or belongs to something else.
            LifecycleError: training has begun.
        """
        self._lifecycle.check_before_training("load_state_dict")
        self._restore(copy.deepcopy(state))

    # Internals -------------------------------------------------------------------------------

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._state.apply(state)
        self._random_state = state["random"]


def _has_content(directory: Path) -> bool:
    """Return whether anything is there; what a killed first save left does not count."""
    if not directory.is_dir():
        return directory.exists()
    return any(not is_temporary(path.name) for path in directory.iterdir())
