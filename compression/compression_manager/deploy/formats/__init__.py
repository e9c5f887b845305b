"""File formats that a converted model is exported to: one module each, registered here."""

from __future__ import annotations

from compression_manager.deploy.formats.aot_inductor import AotInductorFormat
from compression_manager.deploy.formats.base import ExportFormat
from compression_manager.deploy.formats.onnx import OnnxFormat
from compression_manager.deploy.formats.openvino import OpenVinoFormat
from compression_manager.deploy.formats.torch_program import TorchFormat
from compression_manager.errors import ConfigError, suggest

__all__ = ["FORMATS", "ExportFormat", "find_format"]

FORMATS: dict[str, ExportFormat] = {
    item.name: item for item in (OnnxFormat(), OpenVinoFormat(), TorchFormat(), AotInductorFormat())
}


def find_format(name: object) -> ExportFormat:
    """Return the format called `name`.

    Raises:
        ConfigError: there is none; with the nearest names.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"export knows no format {name!r}; {suggest(str(name), FORMATS)}")
    return FORMATS[name]
