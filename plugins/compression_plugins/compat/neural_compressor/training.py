"""`prepare_compression` and the manager that it returns, as in Neural Compressor 2.6."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

import compression_manager
from compression_manager import PluginConfig
from compression_manager.configuration.checks import as_path
from compression_manager.errors import ConfigError
from compression_manager.plugin_host.composition import PluginSpec
from compression_plugins.compat.neural_compressor import config as compat
from compression_plugins.compat.neural_compressor.callbacks import CallBacks
from compression_plugins.compat.neural_compressor.distillation import (
    names_l2,
    translate_distillers,
)
from compression_plugins.compat.neural_compressor.fields import ignored_fields
from compression_plugins.compat.neural_compressor.loop import TrainingLoop
from compression_plugins.compat.neural_compressor.losses import LossesConfig, LossesPlugin
from compression_plugins.compat.neural_compressor.model import (
    CompressedModel,
    Saver,
    unwrapped,
)
from compression_plugins.compat.neural_compressor.outputs import PassedOutputs
from compression_plugins.compat.neural_compressor.pruning import translate_pruning
from compression_plugins.compat.neural_compressor.quantization import translate_quantization
from compression_plugins.compat.neural_compressor.storage import DEFAULT_DIRECTORY, save_float

_QUANTIZING = ("qat", "ptq")


def prepare_compression(model: nn.Module, confs: Any, **kwargs: Any) -> CompressionManager:
    """Let the configs' plugins shape `model` in place and return the manager of its training.

    Args:
        model: the model to train.
        confs: a config or a list of configs: of this package, or of any plugin.
        **kwargs: 2.6 takes any and uses none; they warn.

    Raises:
        ConfigError: a config is invalid, or they do not fit together; the model is as it was.
    """
    return CompressionManager(model, confs, **kwargs)


class CompressionManager(CallBacks):
    """Neural Compressor's manager: the hooks, here and on `callbacks`, `model` and `save`.

    `on_train_end` converts the model, if it is quantized, and removes every hook.

    Attributes:
        model: the student; calls it, and saves it.
        native: the `compression_manager.CompressionManager` beneath, with `report`, `resume`,
            `state_dict` and all else.
    """

    def __init__(self, model: nn.Module, confs: Any, **kwargs: Any) -> None:
        student, passed = unwrapped(model), PassedOutputs()
        given = list(confs) if isinstance(confs, (list, tuple)) else [confs]
        specs, notes = _translate(given, student, passed)
        notes += [f"prepare_compression uses no argument '{name}', as in 2.6." for name in kwargs]
        for note in notes:
            warnings.warn(note, stacklevel=3)
        self.native = compression_manager.prepare_compression(student, specs)
        self._quantizes = any(_plugin_name(spec) in _QUANTIZING for spec in specs)
        distills = any(_plugin_name(spec) == "distillation" for spec in specs)
        self.model = CompressedModel(student, Saver(self._save))
        super().__init__(TrainingLoop(self.native, student, passed, distills=distills))

    @property
    def callbacks(self) -> CallBacks:
        """The hooks; the same as on the manager itself."""
        return self

    def on_train_end(self) -> None:
        """Training ends: a quantized model becomes its int8 form, and every hook is removed.

        Raises:
            ParityError: the int8 model would compute something else.
            QuantizationError: it was not trained.
        """
        super().on_train_end()
        if self._quantizes:
            self.model.become(self.native.convert(self._loop.example_inputs))
        self.close()

    def track(self, **objects: Any) -> None:
        """Register an optimizer and more, as `native.track`; the optimizer is found without it."""
        self.native.track(**objects)
        if objects.get("optimizer") is not None:
            self._loop.knows_optimizer = True

    def save(self, root: str | Path | None = None) -> Path:
        """Write the model for `load`; with quantization in its int8 form, also during training.

        Args:
            root: the directory; by default `nc_workspace`.

        Returns:
            The directory.
        """
        return self.model.save(root)

    def close(self) -> None:
        """Remove every hook; a student that was not converted is a float model again."""
        self._loop.stop_watching()
        self.native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.stop_watching()
        self.native.__exit__(kind, error, trace)

    def _save(self, model: nn.Module, root: str | Path | None) -> Path:
        directory = DEFAULT_DIRECTORY if root is None else root
        if not self._quantizes:
            return save_float(model, directory)
        if self._loop.is_training:
            self.native.convert(self._loop.example_inputs)
        return self.native.save_converted(as_path("save", directory))


def _translate(
    confs: Sequence[Any], model: nn.Module, passed: PassedOutputs
) -> tuple[list[PluginSpec], list[str]]:
    """Return the plugins' configs in the order of `confs`, and what the user should know."""
    given = [conf for conf in confs if isinstance(conf, compat.DistillationConfig)]
    distillers = iter(translate_distillers(given, passed))
    specs: list[PluginSpec] = []
    notes: list[str] = []
    for conf in confs:
        if isinstance(conf, PluginConfig):
            specs.append(conf)
            continue
        if isinstance(conf, compat.DistillationConfig):
            specs.append(next(distillers))
        elif isinstance(conf, compat.QuantizationAwareTrainingConfig):
            config, ignored = translate_quantization(conf)
            specs.append(config)
            notes += ignored
        elif isinstance(conf, compat.WeightPruningConfig):
            configs, ignored = translate_pruning(conf, model)
            specs += configs
            notes += ignored
        else:
            raise ConfigError(
                "prepare_compression takes DistillationConfig, QuantizationAwareTrainingConfig, "
                f"WeightPruningConfig and configs of plugins, got {conf!r}."
            )
        notes += ignored_fields(conf)
    if names_l2(given):
        specs.append(LossesPlugin(LossesConfig()))
    return specs, notes


def _plugin_name(spec: PluginSpec) -> str:
    return spec.plugin if isinstance(spec, PluginConfig) else spec.config.plugin
