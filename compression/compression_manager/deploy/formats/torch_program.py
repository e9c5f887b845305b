"""The archive of `torch.export.save`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from compression_manager.deploy.formats.base import ExportFormat
from compression_manager.deploy.parity import LAYER_TOLERANCE
from compression_manager.quantization.exporting import View
from compression_manager.tracing.compiled_inputs import called_as_examples, described_examples

# Under which name an archive says what its inputs are.
_INPUTS = "compression_manager.inputs"
# Where each operator was called, in which file: most of the bytes of a small model.
_NOTES = ("stack_trace", "torch_fn")


class TorchFormat(ExportFormat):
    """One .pt2 file, which `torch.export.load` reads where this package is not installed.

    It computes with torch's own operators in the same order as the converted model in float32.
    """

    name = "torch"
    tolerance = LAYER_TOLERANCE

    @property
    def view(self) -> View:
        """The formula in torch's own operators."""
        return "formulas"

    def write(self, program: ExportedProgram, path: Path) -> None:
        """Write the archive without example inputs and stack traces, which torch would store."""
        inputs = described_examples(program)
        program.example_inputs = None
        graphs = (item for item in program.graph_module.modules() if isinstance(item, GraphModule))
        for node in (node for item in graphs for node in item.graph.nodes):
            for note in _NOTES:
                node.meta.pop(note, None)
        # torch wants the suffix .pt2 of a path, but not of an open file.
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={_INPUTS: inputs})

    def load(self, path: Path, *, int8: bool) -> Callable[..., Any]:
        """Return what runs the program, on the device it was traced on."""
        extra_files = {_INPUTS: ""}  # torch fills no empty mapping
        with path.open("rb") as file, warnings.catch_warnings():
            # torch 2.10 reads tensors from bytes, of which it warns itself.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            module = torch.export.load(file, extra_files=extra_files).module()

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return module(*args, **kwargs)

        description = extra_files[_INPUTS]
        return called_as_examples(run, description) if description else run
