"""The manager whose hooks the user's loop calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from compression_manager.checks import as_path
from compression_manager.context import Context
from compression_manager.deploy.conversion import Conversion, convert_copy
from compression_manager.deploy.storage import save_converted
from compression_manager.errors import CheckpointError, ConfigError
from compression_manager.lifecycle import Lifecycle
from compression_manager.loading import register, required_hooks
from compression_manager.loops import TrainingLoops
from compression_manager.plugin import Plugin
from compression_manager.position import Position
from compression_manager.quantization.graph import QuantizationGraph
from compression_manager.report import Report, build_report
from compression_manager.sensitivity import Sensitivity, measure_sensitivity
from compression_manager.services import Services
from compression_manager.state import find_checkpoint, read_checkpoint
from compression_manager.state_checks import changed_options, check_kinds, check_model
from compression_manager.training_state import TrainingState


class CompressionManager(TrainingLoops):
    """Sends each event of a training loop to the plugins; made by `prepare_compression`.

    The hooks are called in the order of the loop in `compression_manager.hookspecs`; a hook out
    of order raises LifecycleError. An exception in a plugin is a PluginError that names the
    plugin and the hook, unless it is one of the framework's own errors.
    """

    def __init__(self, context: Context, plugins: Sequence[Plugin[Any]]) -> None:
        pluggy_manager = register(plugins)
        lifecycle = Lifecycle(required_hooks(plugins))
        state = TrainingState(context, plugins, lifecycle)
        super().__init__(pluggy_manager.hook, context, lifecycle, state)
        self._plugins = tuple(plugins)
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
        self._context.parameter_groups.track(objects)

    def resume(self, directory: str | Path, *, missing_ok: bool = False) -> Position:
        """Restore everything from a checkpoint; call it after `track`, before training.

        Args:
            directory: one checkpoint, or the folder of several, whose newest is taken.
            missing_ok: return the start position if there is no checkpoint yet.

        Returns:
            Where to continue; `epochs(n)` does so by itself.

        Warns if options of the plugins differ from those of the checkpoint.

        Raises:
            CheckpointError: there is none, it is corrupt, or it belongs to something else.
            LifecycleError: training has begun.
        """
        self._lifecycle.check_before_training("resume")
        folder = as_path("resume", directory)
        try:
            path = find_checkpoint(folder)
        except CheckpointError:
            if missing_ok and not _has_content(folder):
                return self.position
            raise
        state = read_checkpoint(path)
        try:
            self._restore(state)
        except CheckpointError as error:
            error.args = (f"{path}: {error}", *error.args[1:])
            raise
        changes = changed_options(state["recipe"], self._context.recipe)
        if changes:
            warnings.warn(
                f"{path} was written with other options, so that training goes on otherwise than "
                f"without the interruption: {'; '.join(sorted(changes))}.",
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
        then counts the step, and a resumed run continues with the next one.

        Raises:
            LifecycleError: the step has no loss yet, or its update is under way.
        """
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
            LifecycleError: the manager is closed, so that the model is the float model again.

        The training model is left untouched.
        """
        return self._convert(example_inputs).model

    def save_converted(self, directory: str | Path) -> Path:
        """Write the model that `convert` returned last (converting now if it was not called).

        Returns:
            The directory: `model.safetensors`, `quantization.json` and `manifest.json`, read by
            `compression_manager.deploy.load`.
        """
        folder = as_path("save_converted", directory)
        return save_converted(self._conversion or self._convert(None), folder)

    def report(self, example_inputs: Any = None, *, sensitivity: bool = False) -> Report:
        """Return per layer: quantized how or why not, bytes, and signal-to-noise ratio.

        Args:
            example_inputs: a batch to measure noise on; default as in `convert`.
            sensitivity: add what `sensitivity` measures, at a forward pass per layer.
        """
        self._lifecycle.check_open("report")
        return build_report(
            self.model,
            self._context.skipped_layers,
            self._context.folded_layers,
            self._inputs_or_remembered(example_inputs),
            None if self._conversion is None else self._conversion.parity,
            self.sensitivity(example_inputs) if sensitivity else None,
        )

    def sensitivity(self, example_inputs: Any = None) -> Sensitivity:
        """Return how much each layer's quantization alone disturbs the model's output.

        Publishes `sensitivity/<layer>/output_sqnr_db` and `.../output_kl`, which TensorBoard
        shows. Costs a forward pass per quantized layer.

        Args:
            example_inputs: a batch to measure on; default as in `convert`.

        Raises:
            ConfigError: there is no such batch, or no layer has a range to quantize with yet.
        """
        self._lifecycle.check_open("sensitivity")
        inputs = self._inputs_or_remembered(example_inputs)
        if inputs is None:
            raise ConfigError(
                "sensitivity needs a batch to measure on; pass example_inputs=..., which may also "
                "be given to prepare_compression."
            )
        measured = measure_sensitivity(self.model, inputs)
        for layer in measured.layers:
            prefix = f"sensitivity/{layer.name}" if layer.name else "sensitivity"
            self._context.metrics.scalar(f"{prefix}/output_sqnr_db", layer.output_sqnr_db)
            if layer.output_kl is not None:
                self._context.metrics.scalar(f"{prefix}/output_kl", layer.output_kl)
        self._deliver_metrics()
        return measured

    def graph(self, example_inputs: Any = None) -> QuantizationGraph:
        """Return the operations that the model runs in eval mode, one per line of `str(graph)`.

        A copy of the model is called, so that nothing of the model changes. A fake quantizer is
        listed even before it begins to quantize; `scale=auto` means that it has no range yet.

        Args:
            example_inputs: what the model is called with; default as in `convert`.

        Raises:
            ConfigError: there is no input yet, or the model does not take it.
            QuantizationError: the model cannot be copied.
            LifecycleError: the manager is closed, so that the model is the float model again.
        """
        self._lifecycle.check_open("graph")
        inputs = self._inputs_or_remembered(example_inputs)
        if inputs is None:
            raise ConfigError(
                "graph() needs an input to call the model with: pass example_inputs, here or to "
                "prepare_compression, or call it after the first training step."
            )
        return QuantizationGraph.record(self.model, inputs)

    # Internals -------------------------------------------------------------------------------

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._state.apply(state)
        self._random_state = state["random"]

    def _convert(self, example_inputs: Any) -> Conversion:
        self._begin_call()
        self._lifecycle.check_open("convert")
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


def _has_content(directory: Path) -> bool:
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
