"""The archive of `torch.export.save`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from compression_manager.deploy.formats.base import ExportFormat, Runner
from compression_manager.deploy.parity import LAYER_TOLERANCE
from compression_manager.model_call import call_model, tensors_in


class TorchFormat(ExportFormat):
    """One .pt2 file, which `torch.export.load` reads where this package is not installed.

    It computes with torch's own operators in the same order as the converted model.
    """

    name = "torch"
    operators = False
    tolerance = LAYER_TOLERANCE

    def serialize(self, program: ExportedProgram) -> bytes:
        """Return the archive, without the example inputs, which torch would store as well."""
        program.example_inputs = None
        content = io.BytesIO()
        torch.export.save(program, content)
        return content.getvalue()

    def load(self, path: Path) -> Runner:
        """Return what runs the program, on the device it was traced on."""
        with path.open("rb") as file:
            module = torch.export.load(file).module()

        def run(inputs: Any) -> list[Tensor]:
            with torch.no_grad():
                return list(tensors_in(call_model(module, inputs)))

        return run
