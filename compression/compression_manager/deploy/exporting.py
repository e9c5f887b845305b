"""A converted model as a file for another runtime, compared with the model before it is left."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compression_manager.deploy.formats import ExportFormat, Runner, find_format
from compression_manager.deploy.parity import compare_outputs, full_precision
from compression_manager.deploy.progress import progress
from compression_manager.deploy.tracing import batch_size, brief, trace, with_batch
from compression_manager.errors import ConfigError, NotExportableError, ParityError
from compression_manager.model_call import (
    call_with_examples,
    quiet_evaluation,
    tensors_in,
    without_labels,
)
from compression_manager.quantization.layers import QuantizedLayer
from compression_manager.state.files import (
    is_regular_file,
    make_folder,
    remove_abandoned,
    sync,
    temporary,
    writing,
)


@dataclass(frozen=True)
class Export:
    """A file that was written.

    Attributes:
        path: where it is.
        format: its format.
        size: bytes.
        output_error: largest relative error (root mean square) of its outputs, compared with the
            converted model's at a batch size of one and of the examples; None if `unchecked`.
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


def export(model: nn.Module, path: str | Path, format: str, example_inputs: Any) -> Export:
    """Write a converted model as a file for another runtime, for any batch size.

    The file is loaded again, run, and compared with `model` at a batch size of one and of the
    examples; only then it takes its name, replacing an older one. Progress is shown on stderr.

    Args:
        model: what `convert` returned or `deploy.load` loaded.
        path: the file; its folder is created if need be.
        format: `onnx` (QuantizeLinear and DequantizeLinear, operator set 18; needs the extra
            `onnx`, and onnxruntime for the comparison) or `torch` (.pt2, for `torch.export.load`).
        example_inputs: what the model is called with: a tensor, a tuple (by position) or a mapping
            (by keyword, without its labels). Every tensor whose first dimension is that of the
            first one has the samples in it; all other dimensions are those of the file.

    Raises:
        ConfigError: an unknown format, a missing package, a model that was not converted, or
            inputs that the model does not take.
        NotExportableError: the model cannot be traced or translated.
        ParityError: the file computes something else than the model. It is not left in place.
        CheckpointError: the file cannot be written.

    Warns if the file could not be run, because the runtime is not installed.
    """
    exporter = find_format(format)
    _require_packages(exporter)
    target = _target(path)
    _require_converted(model)
    inputs = without_labels(example_inputs)
    inputs = with_batch(inputs, max(2, batch_size(inputs)))
    with progress(f"exporting {target.name} ({exporter.name})", total=3) as begin:
        begin("tracing")
        references = [_Reference.of(model, inputs), _Reference.of(model, with_batch(inputs, 1))]
        program = trace(model, inputs, operators=exporter.operators)
        begin("translating")
        try:
            content = exporter.serialize(program)
        except Exception as error:
            raise NotExportableError(
                f"the model cannot be written as {exporter.name}: {brief(error)}"
            ) from error
        begin("comparing")
        output_error, unchecked = _write_checked(target, content, exporter, references)
    return Export(Path(path), exporter.name, len(content), output_error, unchecked)


@dataclass(frozen=True)
class _Reference:
    """What the converted model returns for some inputs."""

    inputs: Any
    outputs: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, inputs: Any) -> _Reference:
        with full_precision(), quiet_evaluation(model):
            return cls(inputs, list(tensors_in(call_with_examples(model, inputs))))


def _write_checked(
    target: Path, content: bytes, exporter: ExportFormat, references: list[_Reference]
) -> tuple[float | None, str | None]:
    """Write the file and give it its name if it computes the references.

    Returns:
        The largest error, and why it is not known; one of them is None.
    """
    error, unchecked = None, None
    with ExitStack() as stack:
        with writing(target):
            make_folder(target.parent)
            remove_abandoned(target.parent)
            draft = stack.enter_context(temporary(target, Path.touch))
            draft.write_bytes(content)
            sync(draft)
        if exporter.runtime is None or find_spec(exporter.runtime) is not None:
            error = _check(draft, exporter, references)
        else:
            unchecked = f"not compared with the converted model: {exporter.runtime} is missing"
            warnings.warn(f"{target}: {unchecked}; install it.", stacklevel=3)
        with writing(target):
            os.replace(draft, target)
            sync(target.parent)
    return error, unchecked


def _check(draft: Path, exporter: ExportFormat, references: list[_Reference]) -> float:
    name = f"the {exporter.name} file"
    run: Runner = _or_parity_error(lambda: exporter.load(draft), f"{name} cannot be loaded")
    worst = 0.0
    for reference in references:
        where = f"{name} at batch size {batch_size(reference.inputs)}"
        with full_precision():
            actual = _or_parity_error(lambda: run(reference.inputs), f"{where} fails")  # noqa: B023
        error, tolerance = _difference(reference.outputs, actual, exporter.tolerance, where)
        if not error <= tolerance:
            raise ParityError(
                f"{where} returns other outputs than the converted model: relative error "
                f"{error:.2g} (root mean square), allowed {tolerance:.2g}."
            )
        worst = max(worst, error)
    return worst


def _or_parity_error(action: Callable[[], Any], what: str) -> Any:
    try:
        return action()
    except Exception as error:
        raise ParityError(f"{what}, unlike the converted model: {brief(error)}") from error


def _difference(
    expected: list[Tensor], actual: list[Tensor], tolerance: float, where: str
) -> tuple[float, float]:
    """Return the error of the outputs, and what is allowed."""
    wanted, got = _listed(expected), _listed(actual)
    if wanted != got:
        raise ParityError(f"{where} returns {got} instead of {wanted}.")
    error, tolerance = compare_outputs(expected, actual, tolerance)
    for one, other in zip(expected, actual, strict=True):
        if not one.is_floating_point() and one.numel():
            error = max(error, float((one.cpu() != other.cpu()).double().mean()))
    return error, tolerance


def _listed(outputs: list[Tensor]) -> str:
    """Return types and shapes."""
    kinds = [(str(item.dtype).removeprefix("torch."), tuple(item.shape)) for item in outputs]
    return ", ".join(f"{dtype} {shape}" for dtype, shape in kinds) or "no tensor"


def _require_packages(exporter: ExportFormat) -> None:
    missing = [name for name in exporter.packages if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"export to {exporter.name} needs {' and '.join(missing)}, which the extra "
            f"'{exporter.extra}' installs: pip install 'compression-manager[{exporter.extra}]'"
        )


def _target(path: object) -> Path:
    if not isinstance(path, (str, Path)) or not str(path):
        raise ConfigError(f"export takes the path of a file, got {path!r}.")
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not is_regular_file(target):
        raise ConfigError(f"export writes a file, and {path} is something else; name a file.")
    return target


def _require_converted(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"export takes a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            raise ConfigError(
                f"export takes a converted model; layer '{name}' is still that of training. Pass "
                "what manager.convert() returns, or call manager.export."
            )
