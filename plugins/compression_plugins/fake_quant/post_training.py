"""The post-training quantization plugin: calibration while the model is prepared."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from compression_manager import Plugin, hookimpl
from compression_manager.context import Context
from compression_manager.errors import ConfigError, blame_option
from compression_manager.models.calling import quiet_evaluation
from compression_manager.quantization import FakeQuantizer, ObservedFakeQuantizer
from compression_manager.quantization.layers import SinglePartLayer
from compression_manager.quantization.observers import RangeObserver
from compression_plugins.fake_quant.base import FakeQuantPlugin
from compression_plugins.fake_quant.bias_correction import (
    BiasCorrection,
    OutputMeans,
    find_targets,
)
from compression_plugins.fake_quant.calibration_run import CalibrationData
from compression_plugins.fake_quant.plan import plan_model
from compression_plugins.fake_quant.post_training_config import PTQConfig


class PTQPlugin(FakeQuantPlugin[PTQConfig]):
    """Quantizes a trained model when it is prepared; the hooks of training do nothing.

    Static ranges are observed in the float model, over all calibration batches. A model that is
    trained further keeps them; its weights' ranges follow the weights.
    """

    config_class = PTQConfig
    # All batches count alike; the average that follows training stays near the first one.
    provider_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "calibration": {"observer": "min_max"}
    }

    @hookimpl
    def validate_composition(self, context: Context, plugins: Sequence[Plugin[Any]]) -> None:
        """Plan everything, so that mistakes show before the model is touched."""
        for plugin in plugins:
            if "learned_scale" in plugin.roles:
                raise ConfigError(
                    f"plugin '{self.name}' does not train, but plugin '{plugin.name}' learns "
                    "scales in training; list QATConfig() instead of PTQConfig()."
                )
        self._plan = plan_model(context.model, self.config)
        inputs = [layer.activation for layer in self._plan.layers if layer.activation is not None]
        if self.config.mode == "static" and all(scheme.dynamic for scheme in inputs):
            with blame_option("mode"):
                raise ConfigError(
                    "mode='static' finds no input to calibrate: every quantized layer is "
                    "weight-only or dynamic. Choose mode='weight_only' or 'dynamic'."
                )

    @hookimpl
    def prepare_model(self, context: Context) -> None:
        """Change the planned layers in place, and measure what is to be measured."""
        super().prepare_model(context)
        if self.config.needs_data:
            with blame_option("calibration_data"), quiet_evaluation(context.model):
                self._measure(context)
        else:
            self._quantize(context.model)

    # Internals -------------------------------------------------------------------------------

    def _measure(self, context: Context) -> None:
        """Observe ranges, switch quantization on, and correct biases."""
        model, data = context.model, CalibrationData.of(self.config)
        if self.config.bias_correction:
            data = data.held()
            # Conv-BatchNorm pairs show in a pass in which nobody else reads the outputs.
            replace(data, limit=1).run(model)
        single = {
            name: layer
            for name, layer in self._layers(model).items()
            if isinstance(layer, SinglePartLayer)
        }
        means = OutputMeans(single if self.config.bias_correction else {})
        with ExitStack() as stack:
            stack.enter_context(_remembering_input(context))
            stack.enter_context(_observing(self._static_inputs(model)))
            stack.enter_context(means.watching())
            data.run(model, f"{self.name}: calibration")
        self._check_ranges(model)
        self._quantize(model)
        if self.config.bias_correction:
            self._correct_biases(context, means, data)

    def _quantize(self, model: nn.Module) -> None:
        for layer in self._layers(model).values():
            for quantizer in layer.quantizers():
                quantizer.set_phase(observing=False, quantizing=True)

    def _static_inputs(self, model: nn.Module) -> list[FakeQuantizer]:
        return [
            quantizer
            for layer in self._layers(model).values()
            for quantizer in layer.input_quantizers()
            if not quantizer.scheme.dynamic
        ]

    def _check_ranges(self, model: nn.Module) -> None:
        """Raise or warn where calibration left an input without a range, or data out."""
        inputs = self._static_inputs(model)
        missing = [item.site.layer for item in inputs if not item.is_calibrated()]
        if inputs and len(missing) == len(inputs):
            raise ConfigError(
                "no batch gave a range for the input of any layer: the quantized layers were not "
                "called, or all their inputs held NaN or infinity."
            )
        if missing:
            warnings.warn(
                f"{self.name}: calibration gave no range for the inputs of {_listed(missing)}, "
                "which stay in floating point; give data that uses these layers, or state it with "
                "LayerRule(layer=..., weight_only=True).",
                stacklevel=2,
            )
        skipped = [f"{item.site.layer} ({count})" for item in inputs if (count := _skipped(item))]
        if skipped:
            warnings.warn(
                f"{self.name}: calibration batches with NaN or infinity were left out of the "
                f"ranges of the inputs of {_listed(skipped)}. Check the data.",
                stacklevel=2,
            )

    def _correct_biases(self, context: Context, means: OutputMeans, data: CalibrationData) -> None:
        model = context.model
        targets, reasons = find_targets(model, self._layers(model), self._pairs or {})
        measured = means.means()
        for name in [name for name in targets if name not in measured]:
            del targets[name]
            reasons[name] = "no batch gave it a finite output"
        if not targets:
            with blame_option("bias_correction"):
                raise ConfigError(
                    f"bias_correction=True finds no bias to correct: {_reasoned(reasons)}. Drop it."
                )
        correction = BiasCorrection(model)
        context.add_cleanup(correction.undo, owner=self.name)
        correction.correct(targets, means, data, f"{self.name}: bias correction")
        if reasons:
            print(f"{self.name}: biases not corrected: {_reasoned(reasons)}", file=sys.stderr)


@contextmanager
def _observing(quantizers: Sequence[FakeQuantizer]) -> Iterator[None]:
    """Let input quantizers observe within the block, whatever mode the model is in."""
    for quantizer in quantizers:
        quantizer.set_phase(observing=True, quantizing=False)
        quantizer.train()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.eval()


@contextmanager
def _remembering_input(context: Context) -> Iterator[None]:
    """Keep what the model is called with first, for the parity check and the report."""

    def remember(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # What has both cannot be written as one input.
        if args and not kwargs:
            context.remember_input(args)
        elif kwargs and not args:
            context.remember_input(dict(kwargs))

    handle = context.model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _skipped(quantizer: FakeQuantizer) -> int:
    observer = quantizer.observer if isinstance(quantizer, ObservedFakeQuantizer) else None
    return int(observer.batches_skipped) if isinstance(observer, RangeObserver) else 0


def _reasoned(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"'{name}': {why}" for name, why in reasons.items())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
