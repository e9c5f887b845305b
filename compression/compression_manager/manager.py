"""The manager whose hooks the user's loop calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import pluggy
from torch import nn

from compression_manager import hookspecs, loops
from compression_manager.cleanup import raise_failures
from compression_manager.context import Context
from compression_manager.deploy.conversion import Conversion, convert_copy
from compression_manager.deploy.storage import save_converted
from compression_manager.errors import CheckpointError, ConfigError, LifecycleError
from compression_manager.events import TrainingEvents
from compression_manager.lifecycle import Lifecycle
from compression_manager.loading import announce_exception, register
from compression_manager.plugin import PROJECT_NAME, Plugin
from compression_manager.position import Position
from compression_manager.report import Report, build_report
from compression_manager.services import Services
from compression_manager.state import find_checkpoint, read_checkpoint, restore_random_state
from compression_manager.training_state import TrainingState, check_model

Batch = TypeVar("Batch")


class CompressionManager(TrainingEvents):
    """Sends each event of a training loop to the plugins; made by `prepare_compression`.

    The hooks are called in the order of the loop in `compression_manager.hookspecs`; a hook out
    of order raises LifecycleError. An exception in a plugin is a PluginError that names the
    plugin and the hook, unless it is one of the framework's own errors.
    """

    def __init__(self, context: Context, plugins: Sequence[Plugin[Any]]) -> None:
        pluggy_manager = pluggy.PluginManager(PROJECT_NAME)
        pluggy_manager.add_hookspecs(hookspecs)
        # pluggy calls the last registered first; users expect the order of their list.
        for plugin in reversed(plugins):
            register(pluggy_manager, plugin)
        pluggy_manager.check_pending()
        lifecycle = Lifecycle(_required_hooks(plugins))
        state = TrainingState(context, plugins, lifecycle)
        super().__init__(pluggy_manager.hook, context, lifecycle, state)
        self._plugins = tuple(plugins)
        self._entered = False
        self._conversion: Conversion | None = None
        context.connect(Services(pluggy_manager), state.collect)

    @property
    def model(self) -> nn.Module:
        """The model that was given, shaped in place."""
        return self._context.model

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

        Raises:
            ConfigError: an object has no such methods.
        """
        named = {
            "optimizer": optimizer,
            "scheduler": scheduler,
            "scaler": scaler,
            "dataloader": dataloader,
        }
        given = {name: value for name, value in named.items() if value is not None}
        self._context.tracked.register({**given, **others})

    def resume(self, directory: str | Path, *, missing_ok: bool = False) -> Position:
        """Restore everything from a checkpoint; call it after `track`, before training.

        Args:
            directory: one checkpoint, or the folder of several, whose newest is taken.
            missing_ok: return the start position if there is no checkpoint yet.

        Returns:
            Where to continue; `epochs(n)` does so by itself.

        Raises:
            CheckpointError: there is none, it is corrupt, or it belongs to something else.
            LifecycleError: training has begun.
        """
        self._lifecycle.check_before_training("resume")
        try:
            path = find_checkpoint(Path(directory))
        except CheckpointError:
            if missing_ok and not _has_content(Path(directory)):
                return self.position
            raise
        self.load_state_dict(read_checkpoint(path))
        return self.position

    def load_weights(self, directory: str | Path, *, which: Literal["latest", "best"] = "latest") -> None:
        """Load only the model's tensors from a checkpoint, for example the best one.

        Args:
            directory: one checkpoint, or the folder of several.
            which: of several, the `latest` or the `best`.

        Raises:
            CheckpointError: there is none, it is corrupt, or it belongs to another model.
        """
        state = read_checkpoint(find_checkpoint(Path(directory), which=which))
        check_model(self.model, state["model"])
        self.model.load_state_dict(state["model"])

    def state_dict(self) -> dict[str, Any]:
        """Return the whole training state as nested dicts of plain values and live tensors."""
        return self._state.collect()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; all of it, or nothing if it does not fit.

        Raises:
            CheckpointError: it is no training state, or belongs to something else.
            LifecycleError: training has begun.
        """
        self._lifecycle.check_before_training("load_state_dict")
        self._state.apply(state)
        self._random_state = state["random"]
        restore_random_state(state["random"])

    # The shorter loop ------------------------------------------------------------------------

    def epochs(self, total: int) -> Iterator[int]:
        """Yield the epochs from the present position to `total - 1`, with their events.

        Fires train and epoch begin and end, and stops when `should_stop` is true. When the body
        raises, the plugins' `on_exception` runs and the manager closes.
        """
        if isinstance(total, bool) or not isinstance(total, int) or total < 0:
            raise ConfigError(f"epochs takes a number that is not negative, got {total!r}.")
        return loops.run_epochs(self, self.position.epoch, total)

    def steps(self, loader: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """Yield `(step, batch)` with the step events around the body.

        After `resume` in mid-epoch, the consumed batches are skipped.

        Raises:
            ConfigError: the loader yields no batch.
        """
        return loops.run_steps(self, self._state.loader, loader)

    # After training --------------------------------------------------------------------------

    def convert(self, example_inputs: Any = None) -> nn.Module:
        """Return a new eval-mode model with integer weights that computes what was trained.

        Args:
            example_inputs: a batch for the parity check; default: those given at prepare, or
                the first training batch.

        Raises:
            ParityError: a converted layer computes something else; names the first one.
            QuantizationError: a layer was never calibrated.
            ConfigError: no plugin quantizes anything.

        The training model is left untouched.
        """
        return self._convert(example_inputs).model

    def save_converted(self, directory: str | Path) -> Path:
        """Write the converted model (converting now if `convert` was not called).

        Returns:
            The directory: `model.safetensors`, `quantization.json` and `manifest.json`, read by
            `compression_manager.deploy.load`.
        """
        conversion = self._conversion or self._convert(None)
        return save_converted(conversion, Path(directory))

    def report(self, example_inputs: Any = None) -> Report:
        """Return per layer: quantized how or why not, bytes, and signal-to-noise ratio.

        Args:
            example_inputs: a batch to measure noise on; default as in `convert`.
        """
        inputs = self._inputs_or_remembered(example_inputs)
        return build_report(
            self.model, self._context.skipped_layers, self._context.folded_layers, inputs
        )

    def close(self) -> None:
        """Give the float model back: remove hooks, restore classes and modes, close writers.

        All plugins are closed, whatever one of them raises; a second call does nothing.
        """
        if self._lifecycle.closed:
            return
        self._lifecycle.closed = True
        failures = self._context.run_cleanup()
        raise_failures(failures)

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._abort(error)
        else:
            self.close()

    # How the shorter loop was left -----------------------------------------------------------

    def loop_raised(self) -> None:
        """The body of `epochs` or `steps` raised; `with manager` would know the exception."""
        if not self._entered and not self._lifecycle.closed:
            self._abort(LifecycleError("the body of the training loop raised an exception."))

    def loop_left(self, *hooks: Callable[[], None]) -> None:
        """The body of `epochs` or `steps` left by break or return: fire the events that end it.

        Python discards what is raised while a generator is dropped, so a failure is kept and
        raised by the next call.
        """
        try:
            for hook in hooks:
                hook()
        except Exception as error:
            self._late_failures.append(error)

    def _abort(self, error: BaseException) -> None:
        """Tell every plugin about `error` and close; failures become notes on `error`."""
        failures: list[Exception] = []
        if not self._lifecycle.closed:
            failures += announce_exception(self._hooks, self._context, error)
        self._lifecycle.abandon()
        try:
            self.close()
        except Exception as failure:
            failures.append(failure)
        for item in failures:
            error.add_note(f"while closing: {item}")

    # Internals -------------------------------------------------------------------------------

    def _convert(self, example_inputs: Any) -> Conversion:
        self._begin_call()
        self._conversion = convert_copy(
            self.model,
            lambda conversion: self._hooks.convert_model(
                context=self._context, conversion=conversion
            ),
            self._inputs_or_remembered(example_inputs),
        )
        return self._conversion

    def _inputs_or_remembered(self, example_inputs: Any) -> Any:
        return self._context.remembered_input if example_inputs is None else example_inputs


def _required_hooks(plugins: Sequence[Plugin[Any]]) -> dict[str, list[str]]:
    required: dict[str, list[str]] = {}
    for plugin in plugins:
        for hook in plugin.required_hooks():
            required.setdefault(hook, []).append(plugin.name)
    return required


def _has_content(directory: Path) -> bool:
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
