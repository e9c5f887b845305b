"""A converted model as a file for another runtime, compared with the model before it is left."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from compression_manager.deploy.formats import ExportFormat, find_format
from compression_manager.deploy.packages import install_command, missing_packages
from compression_manager.deploy.progress import progress
from compression_manager.deploy.reference import Reference, require_converted
from compression_manager.errors import CheckpointError, ConfigError, NotExportableError
from compression_manager.models.calling import tensors_in, without_labels
from compression_manager.state.files import (
    is_regular_file,
    make_folder,
    remove_abandoned,
    sync,
    temporary,
    writing,
)
from compression_manager.tracing.graph_inputs import without_constants
from compression_manager.tracing.program import (
    batch_size,
    brief,
    samples_in,
    trace,
    with_batch,
)


@dataclass(frozen=True)
class Export:
    """A file that was written.

    Attributes:
        path: where it is.
        format: its format.
        size: bytes, of all its files.
        output_error: largest relative error (root mean square) of its outputs, compared with the
            converted model's at the batch size of the examples, and at that of one if it is
            dynamic; None if `unchecked`.
        unchecked: why the file was not run, or None.
    """

    path: Path
    format: str
    size: int
    output_error: float | None
    unchecked: str | None = None

    def __str__(self) -> str:
        checked = self.unchecked
        if self.output_error is not None:
            checked = f"outputs as the converted model's: relative error {self.output_error:.1e}"
        return f"{self.path}: {self.format}, {self.size:,} bytes; {checked}"


def export(
    model: nn.Module,
    path: str | Path,
    format: str,
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
) -> Export:
    """Write a converted model as a file for another runtime, by default for any batch size.

    The file is loaded again, run, and compared with `model` for the examples, and for a single
    sample if the batch is dynamic; only then it takes its name, replacing an older one. Progress
    is shown on stderr.

    Args:
        model: what `convert` returned or `deploy.load` loaded.
        path: the file; its folder is created if need be.
        format: `onnx` (QuantizeLinear and DequantizeLinear, operator set 18; needs the extra
            `onnx`, and onnxruntime for the comparison), `openvino` (.xml with .bin beside it;
            needs the extra `openvino`), `torch` (.pt2, for `torch.export.load`) or
            `aot_inductor` (.pt2, native code for processors like this one).
        example_inputs: what the model is called with: a tensor, a tuple (by position) or a mapping
            (by keyword, without its labels).
        dynamic_batch: let the file take any number of samples: dimension 0 of every tensor in
            which it is as long as in the first. All other sizes are as in the examples. With
            False all are, for models whose inputs count something else in dimension 0, such as
            the nodes and edges of a graph.

    Raises:
        ConfigError: an unknown format, a missing package, a model that was not converted, or
            inputs that the model does not take, at any number of samples if it is dynamic.
        NotExportableError: the model cannot be traced or translated, or the runtime lacks what
            the file needs.
        ParityError: the file computes something else than the model. It is not left in place.
        CheckpointError: the file cannot be written.

    Warns if the file could not be run, because the runtime is not installed.
    """
    exporter = find_format(format)
    _require_packages(exporter)
    target = _target(path, exporter)
    require_converted(model, "export")
    inputs = without_labels(example_inputs)
    with progress(f"exporting {target.name} ({exporter.name})", total=3) as begin:
        begin("tracing")
        references = _references(model, inputs, dynamic_batch)
        program = trace(
            model, references[0].inputs, view=exporter.view, dynamic_batch=dynamic_batch
        )
        with ExitStack() as stack:
            with writing(target):
                make_folder(target.parent)
                remove_abandoned(target.parent)
                folder = stack.enter_context(temporary(target, Path.mkdir))
            begin("writing")
            draft = folder / target.name
            _write(exporter, program, draft)
            begin("comparing")
            output_error, unchecked = _check(exporter, draft, target, references)
            with writing(target):
                size = sum(file.stat().st_size for file in folder.iterdir())
                _install(folder, target)
    return Export(Path(path), exporter.name, size, output_error, unchecked)


def _references(model: nn.Module, inputs: Any, dynamic_batch: bool) -> list[Reference]:
    """Return what the file is compared with; the first has the inputs to trace the model with.

    Raises:
        ConfigError: the model does not take the inputs, or another number of samples.
    """
    size = batch_size(inputs)
    examples = Reference.of(model, with_batch(inputs, size))
    if not dynamic_batch:
        return [examples]
    try:
        other = Reference.of(model, with_batch(inputs, 1 if size > 1 else 2))
    except ConfigError as error:
        made = "the single sample cut from them" if size > 1 else "their one sample twice"
        raise ConfigError(
            f"the model takes the example inputs, but not {made} ({error.__cause__!r}): "
            f"dimension 0 of {samples_in(model, inputs)} was taken for the samples. If it counts "
            "something else, export with dynamic_batch=False, which keeps all sizes as in the "
            f"examples; if one of them has the size {size} there by chance, give examples of "
            "another number of samples."
        ) from error
    return [examples, other] if size > 1 else [other, examples]


def _write(exporter: ExportFormat, program: ExportedProgram, draft: Path) -> None:
    try:
        exporter.write(program, draft)
        for file in draft.parent.iterdir():
            sync(file)
    except OSError as error:
        raise CheckpointError(f"cannot write {draft}: {error}") from error
    except NotExportableError:
        raise
    except Exception as error:
        raise NotExportableError(
            f"the model cannot be written as {exporter.name}: {brief(error)}"
        ) from error


def _check(
    exporter: ExportFormat, draft: Path, target: Path, references: list[Reference]
) -> tuple[float | None, str | None]:
    """Return the largest error of the file, and why it is not known; one of them is None."""
    if exporter.runtime is not None and missing_packages([exporter.runtime]):
        unchecked = f"not compared with the converted model: {exporter.runtime} is missing"
        warnings.warn(
            f"{target}: {unchecked}; {install_command(exporter.runtime_extra)}", stacklevel=3
        )
        return None, unchecked
    # For each anew: what was loaded may remember what it wrote to buffers.
    return max(_error_of(exporter, draft, reference) for reference in references), None


def _error_of(exporter: ExportFormat, draft: Path, reference: Reference) -> float:
    """Return the error of the file's outputs.

    Raises:
        NotExportableError: the runtime does not load or run the file.
        ParityError: it computes something else.
    """
    name, runtime = f"the {exporter.name} file", exporter.runtime or "torch"
    try:
        run = exporter.load(draft, int8=False)
    except Exception as error:
        raise NotExportableError(
            f"{runtime} cannot load {name}: {brief(error)}{_advice_on_types(reference)}"
        ) from error
    if exporter.runtime is not None:  # of torch itself, it takes what the model takes
        run = without_constants(run)
    try:
        return reference.compare(run, exporter.tolerance, name)
    except NotExportableError as error:
        raise NotExportableError(f"{error}{_advice_on_types(reference)}") from error


def _advice_on_types(reference: Reference) -> str:
    """Return what to do about floats that few kernels of other runtimes compute in."""
    tensors = tensors_in((reference.inputs, reference.output))
    dtypes = {item.dtype for item in tensors if item.is_floating_point()} - {torch.float32}
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return f"; the model computes in {names}, convert it to float32 first." if dtypes else ""


def _install(folder: Path, target: Path) -> None:
    """Give the files of a folder their names beside `target`."""
    others = [file for file in folder.iterdir() if file.name != target.name]
    for other in others:
        _require_file(target.with_name(other.name))
    if others:
        # A kill between the files then leaves no model, rather than halves of two.
        target.unlink(missing_ok=True)
    for file in (*others, folder / target.name):
        os.replace(file, target.with_name(file.name))
    sync(target.parent)


def _require_packages(exporter: ExportFormat) -> None:
    missing = missing_packages(exporter.packages)
    if missing:
        raise ConfigError(
            f"export to {exporter.name} needs {' and '.join(missing)}, which the extra "
            f"'{exporter.extra}' installs: {install_command(exporter.extra)}"
        )


def _target(path: object, exporter: ExportFormat) -> Path:
    if not isinstance(path, (str, Path)) or not str(path):
        raise ConfigError(f"export takes the path of a file, got {path!r}.")
    target = Path(os.path.realpath(path))
    if exporter.suffix is not None and target.suffix != exporter.suffix:
        raise ConfigError(
            f"a file of the format {exporter.name} is named *{exporter.suffix}, got {path}."
        )
    _require_file(target)
    return target


def _require_file(path: Path) -> None:
    """Raise a ConfigError if `path` is something that a file cannot replace."""
    if os.path.lexists(path) and not is_regular_file(path):
        raise ConfigError(f"export writes a file, and {path} is something else; name a file.")
