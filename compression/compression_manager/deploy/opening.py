"""Exported files, called as the model is."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compression_manager.configuration.checks import as_path
from compression_manager.deploy.formats import FORMATS, ExportFormat
from compression_manager.deploy.formats.openvino import OpenVinoFormat
from compression_manager.deploy.packages import install_command, missing_packages
from compression_manager.errors import ConfigError
from compression_manager.tracing.program import brief


class ExportedModel:
    """What runs an exported file; made by `load_exported`.

    Attributes:
        path: the file.
        format: its format.
    """

    def __init__(self, path: Path, format: str, run: Callable[..., Any]) -> None:
        self.path = path
        self.format = format
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs; arguments as the exported model's.

        Returns:
            What the model returns, from `torch` and `aot_inductor`; from `onnx` and `openvino` the
            same of dicts, lists and tuples, as `load_exported` says, with tensors on the CPU.

        Raises:
            ConfigError: other tensors than the file takes: others by number, name or size, or
                with different numbers of samples; and of another dtype (`openvino`, `torch`,
                `aot_inductor`).
        """
        return self._run(*args, **kwargs)

    def __repr__(self) -> str:
        return f"ExportedModel({self.path}, {self.format})"


def load_exported(path: str | Path, *, int8: bool = True, bfloat16: bool = False) -> ExportedModel:
    """Load a file that `export` wrote, to be called as the model is.

    ONNX files run in onnxruntime and .xml files in OpenVINO, on the CPU, with as many threads as
    torch has when they are loaded. Both return tensors nested as the model's, with the numbers,
    texts and None that stood beside them when it was exported, in dicts, lists and tuples: a
    mapping of another class, such as a `ModelOutput` of transformers, and a dataclass come back as
    a dict with the same keys, a named tuple as a tuple. A file written before these were kept
    returns its tensor, or the tuple of them.

    Args:
        path: the file.
        int8: whether onnxruntime and OpenVINO may use their 8-bit kernels, which on processors
            without VNNI overflow silently (`fastest` compares). Without them they compute the same
            numbers in float32. Other formats compute as they were written.
        bfloat16: whether OpenVINO computes what is not quantized (attention, normalization, sums)
            in bfloat16, whose rounding is off by up to 2^-9 of each number, where the processor
            has such products (AMX, AVX-512 BF16); in float32 elsewhere. Integers are multiplied
            as before.

    Raises:
        ConfigError: no such file, none of these formats, a damaged one, or a missing package;
            bfloat16 for a file that OpenVINO does not run.
    """
    file = as_path("deploy.load_exported", path, of="file")
    if not file.is_file():
        raise ConfigError(f"there is no file {path} to load.")
    format = _format_of(file)
    if bfloat16:
        format = _in_bfloat16(format, file)
    assert format.runtime_extra is not None or format.runtime is None
    if format.runtime is not None and missing_packages([format.runtime]):
        raise ConfigError(
            f"{path} needs {format.runtime}, which the extra '{format.runtime_extra}' installs: "
            f"{install_command(format.runtime_extra)}"
        )
    try:
        run = format.load(file, int8=int8)
    except Exception as error:
        raise ConfigError(f"{path} cannot be loaded as {format.name}: {brief(error)}") from error
    return ExportedModel(file, format.name, run)


def _in_bfloat16(format: ExportFormat, file: Path) -> ExportFormat:
    if not isinstance(format, OpenVinoFormat):
        raise ConfigError(
            f"{file} has the format '{format.name}', which computes in the types that it was "
            "written with; bfloat16=True is for files that OpenVINO runs: export as 'openvino'."
        )
    return OpenVinoFormat(bfloat16=True)


def _format_of(file: Path) -> ExportFormat:
    """Return the format by the content of zip archives, else by the end of the name."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        compiled = any("/data/aotinductor/" in f"/{name}" for name in names)
        return FORMATS["aot_inductor" if compiled else "torch"]
    if file.suffix == ".pt2":
        raise ConfigError(f"{file} is no zip archive, as files of this kind are; it is damaged.")
    return FORMATS["openvino" if file.suffix == ".xml" else "onnx"]
