"""The archive of `torch.export.save`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from compression_manager.deploy.formats.base import ExportFormat
from compression_manager.deploy.parity import LAYER_TOLERANCE
from compression_manager.quantization.exporting import View

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
        program.example_inputs = None
        graphs = (item for item in program.graph_module.modules() if isinstance(item, GraphModule))
        for node in (node for item in graphs for node in item.graph.nodes):
            for note in _NOTES:
                node.meta.pop(note, None)
        # torch wants the suffix .pt2 of a path, but not of an open file.
        with path.open("wb") as file:
            torch.export.save(program, file)

    def load(self, path: Path, *, int8: bool) -> Callable[..., Any]:
        """Return what runs the program, on the device it was traced on."""
        with path.open("rb") as file:
            module = torch.export.load(file).module()

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return module(*args, **kwargs)

        return run
