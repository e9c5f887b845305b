"""ONNX with QuantizeLinear and DequantizeLinear; needs the extra `onnx`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from compression_manager.deploy.formats.base import ExportFormat
from compression_manager.deploy.parity import MODEL_TOLERANCE


class OnnxFormat(ExportFormat):
    """One .onnx file, weights included: operator set 18, any batch size.

    ONNX divides by the scale where torch multiplies by its reciprocal, so that a value in the
    middle between two integers may fall on the other one.
    """

    name = "onnx"
    packages = ("onnx", "onnxscript")
    extra = "onnx"
    runtime = "onnxruntime"
    runtime_extra = "onnxruntime"
    tolerance = MODEL_TOLERANCE

    # The libraries are imported when they are needed.

    def write(self, program: ExportedProgram, path: Path) -> None:
        """Write the serialized ModelProto."""
        from compression_manager.integrations.onnx_export import to_onnx

        path.write_bytes(to_onnx(program))

    def load(self, path: Path, *, int8: bool) -> Callable[..., Any]:
        """Return what runs the file in onnxruntime, on the CPU."""
        from compression_manager.integrations.onnx_runtime import load_onnx

        return load_onnx(path, int8=int8)
