"""What users ask a manager for when they want to see or deploy what was trained."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from compression_manager.configuration.checks import as_path
from compression_manager.deploy.conversion import Conversion, convert_copy
from compression_manager.deploy.converted_run import describe_reads
from compression_manager.deploy.exporting import Export, export
from compression_manager.deploy.formats import find_format
from compression_manager.deploy.storage import save_converted
from compression_manager.errors import ConfigError
from compression_manager.quantization.graph import QuantizationGraph
from compression_manager.report import Report
from compression_manager.report.report import build_report
from compression_manager.report.sensitivity import Sensitivity, measure_sensitivity
from compression_manager.training.loops import TrainingLoops


class Inspection(TrainingLoops):
    """Conversion, report, sensitivity and graph of the manager's model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._conversion: Conversion | None = None

    @property
    def model(self) -> nn.Module:
        """The model that was given, shaped in place."""
        return self._context.model

    def convert(self, example_inputs: Any = None) -> nn.Module:
        """Return a new eval-mode model that computes what was trained, with integer weights.

        Args:
            example_inputs: a batch for the parity check; default: those given at prepare, or
                the first training batch.

        Raises:
            ParityError: a converted layer computes something else; names the first one.
            QuantizationError: a layer was never calibrated.
            ConfigError: no plugin converts anything.
            LifecycleError: the manager is closed, so that the model is the float model again.

        The training model is left untouched. After pruning alone the weights stay floating point.
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

    def export(
        self,
        path: str | Path,
        format: str,
        example_inputs: Any = None,
        *,
        dynamic_batch: bool = True,
    ) -> Export:
        """Write the model that `convert` returned last (converting now if it was not called).

        The file is compared with the converted model before it takes its name; see
        `compression_manager.deploy.export`.

        Args:
            path: the file, for example `model.onnx`.
            format: `onnx`, `openvino`, `torch` or `aot_inductor`; see `deploy.export`.
            example_inputs: a batch to trace and compare with; default as in `convert`.
            dynamic_batch: let the file take any number of samples; else all sizes are those of
                the examples.

        Raises:
            ConfigError: an unknown format, a missing package, or no input.
            NotExportableError: the model cannot be traced or translated, or the runtime lacks what
                the file needs.
            ParityError: the file computes something else than the converted model.
            CheckpointError: the file cannot be written.
        """
        find_format(format)  # before the work of converting
        inputs = self._some_inputs("export", example_inputs)
        conversion = self._conversion or self._convert(example_inputs)
        return export(conversion.model, path, format, inputs, dynamic_batch=dynamic_batch)

    def report(
        self, example_inputs: Any = None, *, sensitivity: bool = False, graph: bool = False
    ) -> Report:
        """Return per layer: quantized how or why not, bytes, and signal-to-noise ratio.

        Args:
            example_inputs: a batch to measure noise on; default as in `convert`.
            sensitivity: add what `sensitivity` measures, at a forward pass per layer.
            graph: add what `graph` lists.
        """
        self._lifecycle.check_open("report")
        report = build_report(
            self.model,
            self._context.skipped_layers,
            self._context.folded_layers,
            self._inputs_or_remembered(example_inputs),
        )
        return replace(
            report,
            parity=None if self._conversion is None else self._conversion.parity,
            sensitivity=self.sensitivity(example_inputs) if sensitivity else None,
            graph=self.graph(example_inputs) if graph else None,
            notes=dict(self._context.notes),
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
        measured = measure_sensitivity(self.model, self._some_inputs("sensitivity", example_inputs))
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
        return QuantizationGraph.record(self.model, self._some_inputs("graph", example_inputs))

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
        parity = self._conversion.parity
        if parity is not None and parity.read_weights:
            warnings.warn(f"{describe_reads(parity.read_weights)}.", stacklevel=3)
        return self._conversion

    def _inputs_or_remembered(self, example_inputs: Any) -> Any:
        return self._context.remembered_input if example_inputs is None else example_inputs

    def _some_inputs(self, method: str, example_inputs: Any) -> Any:
        inputs = self._inputs_or_remembered(example_inputs)
        if inputs is None:
            raise ConfigError(
                f"{method}() needs an input to call the model with: pass example_inputs, here or "
                "to prepare_compression, or call it after the first training step."
            )
        return inputs
