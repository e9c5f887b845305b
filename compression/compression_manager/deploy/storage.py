"""Converted models on disk: safetensors and JSON, verified before anything is changed.

A directory holds `model.safetensors` (all tensors), `quantization.json` (which layers were
replaced, and how) and `manifest.json` (SHA-256 of both). Nothing in it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from compression_manager.deploy.conversion import Conversion
from compression_manager.deploy.layers import CONVERTED_CLASSES, ConvertedLayer, LayerSpec
from compression_manager.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    ConfigError,
    QuantizationError,
    suggest,
)
from compression_manager.quantization.fused_paths import disable_fused_paths
from compression_manager.state import atomic_directory, verify_directory

FORMAT_NAME = "compression_manager.converted"
_TENSORS = "model.safetensors"
_LAYERS = "quantization.json"


def save_converted(conversion: Conversion, directory: Path) -> Path:
    """Write a conversion; replaces an earlier one at the same place, or leaves it as it was.

    Returns:
        `directory`.

    Raises:
        CheckpointError: it cannot be written.
    """
    document = {
        "layers": [
            {
                "name": replacement.name,
                "absorbed": list(replacement.absorbed),
                **replacement.layer.spec.to_dict(),
            }
            for replacement in conversion.replacements
        ]
    }
    with atomic_directory(directory, format_name=FORMAT_NAME) as temporary:
        state = _without_aliases(conversion.model.state_dict())
        safetensors.torch.save_file(state, temporary / _TENSORS)
        (temporary / _LAYERS).write_text(json.dumps(document, separators=(",", ":")))
    return directory


def load(directory: str | Path, float_model: nn.Module) -> nn.Module:
    """Change a fresh float model into the converted one that was saved.

    Args:
        directory: what `manager.save_converted` wrote.
        float_model: a model of the same architecture; its weights are replaced.

    Returns:
        `float_model` (another object if the whole model was one layer), in eval mode.

    Raises:
        CheckpointError: there is no converted model, or it is corrupt.
        CheckpointMismatchError: it belongs to another architecture; the model is unchanged.
    """
    if not isinstance(float_model, nn.Module):
        raise ConfigError(
            f"deploy.load takes a torch.nn.Module to change, got {type(float_model).__name__}."
        )
    manifest = verify_directory(Path(directory), format_name=FORMAT_NAME)
    tensors = safetensors.torch.load_file(manifest.path(_TENSORS))
    entries = _read_entries(manifest.path(_LAYERS))
    replacements = {entry["name"]: _build(float_model, entry, directory) for entry in entries}
    absorbed = [name for entry in entries for name in entry["absorbed"]]
    _check_tensors(float_model, replacements, absorbed, tensors, directory)

    conversion = Conversion(float_model)
    for entry in entries:
        conversion.replace(entry["name"], replacements[entry["name"]], entry["absorbed"])
    disable_fused_paths(conversion.model)
    conversion.model.load_state_dict(_with_aliases(conversion.model, tensors))
    return conversion.model.eval()


def _read_entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text())["layers"]
        for entry in entries:
            entry["spec"] = LayerSpec.from_dict(entry)
    except (ValueError, KeyError, TypeError, QuantizationError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error!r}.") from error
    return list(entries)


def _build(model: nn.Module, entry: Mapping[str, Any], directory: str | Path) -> ConvertedLayer:
    modules = dict(model.named_modules())
    spec: LayerSpec = entry["spec"]
    for name in (entry["name"], *entry["absorbed"]):
        if name not in modules:
            raise CheckpointMismatchError(
                f"{directory}: the model has no layer '{name}'; {suggest(name, modules)}"
            )
    layer = modules[entry["name"]]
    if type(layer).__name__ != spec.kind or spec.kind not in CONVERTED_CLASSES:
        raise CheckpointMismatchError(
            f"{directory}: layer '{entry['name']}' was a {spec.kind}; here it is a "
            f"{type(layer).__name__}. Pass a fresh float model of the same architecture."
        )
    return CONVERTED_CLASSES[spec.kind](layer, spec)


def _check_tensors(
    model: nn.Module,
    replacements: Mapping[str, ConvertedLayer],
    absorbed: list[str],
    tensors: Mapping[str, Tensor],
    directory: str | Path,
) -> None:
    """Compare names and shapes with what the model will hold once it is changed."""
    expected: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        owner = name.rpartition(".")[0]
        if owner not in replacements and owner not in absorbed:
            expected[name] = value
    for name, layer in replacements.items():
        prefix = f"{name}." if name else ""
        expected.update(layer.state_dict(prefix=prefix))
    shared = _aliases(model.state_dict())
    for name, value in expected.items():
        source = name if name in tensors else shared.get(name, name)
        if source not in tensors:
            raise CheckpointMismatchError(
                f"{directory}: holds no tensor '{name}'; {suggest(name, tensors)}"
            )
        if tensors[source].shape != value.shape:
            raise CheckpointMismatchError(
                f"{directory}: tensor '{name}' has shape {tuple(tensors[source].shape)}, the model "
                f"needs {tuple(value.shape)}."
            )
    for name in tensors:
        if name not in expected:
            raise CheckpointMismatchError(
                f"{directory}: tensor '{name}' has no place in the model; {suggest(name, expected)}"
            )


def _aliases(state: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> first name under which the same tensor appears, for all later names."""
    first: dict[tuple[Any, ...], str] = {}
    found: dict[str, str] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and key in first:
            found[name] = first[key]
        else:
            first[key] = name
    return found


def _without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors to write: each tied one once, contiguous, on the CPU."""
    tied = _aliases(state)
    return {
        name: value.detach().cpu().contiguous() for name, value in state.items() if name not in tied
    }


def _with_aliases(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tied = _aliases(model.state_dict())
    return {name: tensors[name if name in tensors else tied[name]] for name in model.state_dict()}
