"""OpenVINO's intermediate representation; needs the extra `openvino`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from compression_manager.deploy.formats.base import ExportFormat
from compression_manager.deploy.parity import MODEL_TOLERANCE


class OpenVinoFormat(ExportFormat):
    """Two files, the graph in .xml and the weights in .bin, read from the model's ONNX form.

    The integers differ from the model's where those of ONNX do.

    Args:
        bfloat16: whether files are run with bfloat16 for all that is not quantized.
    """

    name = "openvino"
    suffix = ".xml"
    packages = ("onnx", "onnxscript", "openvino")
    extra = "openvino"
    runtime = "openvino"
    runtime_extra = "openvino"
    tolerance = MODEL_TOLERANCE

    def __init__(self, *, bfloat16: bool = False) -> None:
        self._bfloat16 = bfloat16

    # The libraries are imported when they are needed.

    def write(self, program: ExportedProgram, path: Path) -> None:
        """Write graph and weights."""
        from compression_manager.integrations.onnx_export import to_onnx
        from compression_manager.integrations.openvino_runtime import write_openvino

        write_openvino(to_onnx(program), path)

    def load(self, path: Path, *, int8: bool) -> Callable[..., Any]:
        """Return what runs the files in OpenVINO, on the CPU."""
        from compression_manager.integrations.openvino_runtime import load_openvino

        return load_openvino(path, int8=int8, bfloat16=self._bfloat16)
