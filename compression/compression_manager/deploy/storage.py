"""Converted models on disk: safetensors and JSON, verified before anything is changed.

A directory holds `model.safetensors` (all tensors), `quantization.json` (which layers were
replaced, and how) and `manifest.json` (SHA-256 of both). Nothing in it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from compression_manager.configuration.checks import as_path
from compression_manager.deploy.conversion import Conversion
from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.kinds import CONVERTED_CLASSES
from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.deploy.layers.settings import differing_setting, layer_settings
from compression_manager.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    QuantizationError,
    suggest,
)
from compression_manager.quantization.fused_paths import disable_fused_paths
from compression_manager.quantization.integer.cpu_features import cpu_features
from compression_manager.quantization.integer.selection import prepare_native
from compression_manager.quantization.layers import quantized_class
from compression_manager.state import Manifest, atomic_directory, read_directory

FORMAT_NAME = "compression_manager.converted"
# 2: integers of less than 8 bits are packed, and symmetric weights have no zero points.
FORMAT_VERSION = 2
_TENSORS = "model.safetensors"
_LAYERS = "quantization.json"


def save_converted(conversion: Conversion, directory: Path) -> Path:
    """Write a conversion; replaces an earlier one at the same place, or leaves it as it was.

    Returns:
        `directory`.

    Raises:
        CheckpointError: it cannot be written.
    """
    state = conversion.model.state_dict()
    tied = _aliases(state, directory)
    document = {
        "layers": [
            {
                "name": replacement.name,
                "absorbed": list(replacement.absorbed),
                **replacement.layer.spec.to_dict(),
                "settings": layer_settings(replacement.layer),
            }
            for replacement in conversion.replacements
        ],
        "tied": tied,
    }
    with atomic_directory(directory, format_name=FORMAT_NAME, version=FORMAT_VERSION) as temporary:
        own = {name: value for name, value in state.items() if name not in tied}
        safetensors.torch.save_file(_without_overlaps(own), temporary / _TENSORS)
        text = json.dumps(document, separators=(",", ":"))
        (temporary / _LAYERS).write_text(text, encoding="utf-8")
    return directory


def load(directory: str | Path, float_model: nn.Module) -> nn.Module:
    """Change a fresh float model into the converted one that was saved.

    This makes the native kernels ready, if they were built before; on a CPU without VNNI they are
    built now. Where there are none, slower ones compute the same numbers.

    Args:
        directory: what `manager.save_converted` wrote.
        float_model: a model of the same architecture; its weights are replaced.

    Returns:
        `float_model` (another object if the whole model was one layer), in eval mode, and without
        Parameters that need a gradient.

    Raises:
        CheckpointError: there is no converted model, it is corrupt, or an earlier version saved it.
        CheckpointMismatchError: it belongs to another architecture; the model is unchanged.
        ConfigError: `float_model` is no module, or the environment variable
            COMPRESSION_MANAGER_NATIVE is neither 0 nor 1.
    """
    if not isinstance(float_model, nn.Module):
        raise ConfigError(
            f"deploy.load takes a torch.nn.Module to change, got {type(float_model).__name__}."
        )
    tensors, entries, tied = read_directory(
        as_path("deploy.load", directory), _read, format_name=FORMAT_NAME, version=FORMAT_VERSION
    )
    tensors |= {name: tensors[source] for name, source in tied.items() if source in tensors}

    conversion = Conversion(float_model)
    built = [(entry, _build(float_model, entry, directory)) for entry in entries]
    try:
        for entry, layer in built:
            conversion.replace(entry.name, layer, entry.absorbed)
        state = conversion.model.state_dict()
        _check_tensors(state, tensors, directory)
        _check_ties(state, tensors, directory)
    except BaseException:
        conversion.undo()
        raise
    disable_fused_paths(conversion.model)
    conversion.model.load_state_dict(tensors)
    conversion.model.requires_grad_(False)  # as in `convert_copy`
    _share_tied_weights(conversion, tied)
    # With VNNI they quantize inputs alone, which is not worth a build.
    prepare_native(builds=not cpu_features().vnni)
    return conversion.model.eval()


@dataclass(frozen=True)
class _Entry:
    """What `quantization.json` says about one layer."""

    name: str
    absorbed: tuple[str, ...]
    spec: LayerSpec
    settings: Mapping[str, Any]


def _read(manifest: Manifest) -> tuple[dict[str, Tensor], list[_Entry], dict[str, str]]:
    """Return the tensors, the layers, and name -> first name of what is saved once."""
    if manifest.version < FORMAT_VERSION:
        raise CheckpointError(
            f"{manifest.directory} has version {manifest.version} of the format '{FORMAT_NAME}', "
            f"whose integers are not packed; this release reads version {FORMAT_VERSION}. Convert "
            "the trained model again, and save it."
        )
    return safetensors.torch.load_file(manifest.path(_TENSORS)), *_read_document(
        manifest.path(_LAYERS)
    )


def _read_document(path: Path) -> tuple[list[_Entry], dict[str, str]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        entries = [
            _Entry(
                name=str(item["name"]),
                absorbed=tuple(item["absorbed"]),
                spec=LayerSpec.from_dict(item),
                settings=dict(item.get("settings", {})),  # earlier releases wrote none
            )
            for item in document["layers"]
        ]
        return entries, dict(document["tied"])
    except (ValueError, KeyError, TypeError, QuantizationError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {error!r}.") from error


def _build(model: nn.Module, entry: _Entry, directory: str | Path) -> ConvertedLayer:
    modules = dict(model.named_modules())
    for name in (entry.name, *entry.absorbed):
        if name not in modules:
            raise CheckpointMismatchError(
                f"{directory}: the model has no layer '{name}'; {suggest(name, modules)}"
            )
    layer, kind = modules[entry.name], entry.spec.kind
    supported = quantized_class(type(layer)) is not None
    if kind not in CONVERTED_CLASSES or not supported or type(layer).__name__ != kind:
        found, module = type(layer).__qualname__, type(layer).__module__
        raise CheckpointMismatchError(
            f"{directory}: layer '{entry.name}' was a {kind}; here it is a {found} of {module}. "
            "Pass a fresh float model of the same architecture."
        )
    converted = CONVERTED_CLASSES[kind](layer, entry.spec)
    difference = differing_setting(entry.settings, converted)
    if difference is not None:
        raise CheckpointMismatchError(
            f"{directory}: layer '{entry.name}' was a {kind} with {difference}. Pass a fresh float "
            "model of the same architecture."
        )
    parameters = next(model.parameters(), None)
    if parameters is not None and not any(True for _ in layer.parameters()):
        converted.to(parameters.device)  # it had no tensor that could tell it
    return converted


def _check_tensors(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], directory: str | Path
) -> None:
    """Compare names, shapes and dtypes with what the changed model holds."""
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            raise CheckpointMismatchError(
                f"{directory}: '{name}' of the model's state is a {type(value).__name__}; only "
                "tensors are saved."
            )
        if value.is_meta:
            raise CheckpointMismatchError(
                f"{directory}: '{name}' of the model is on the device 'meta', without values; call "
                "model.to_empty(device='cpu') first."
            )
        if name not in tensors:
            raise CheckpointMismatchError(
                f"{directory}: holds no tensor '{name}'; {suggest(name, tensors)}"
            )
        saved = tensors[name]
        if (saved.shape, saved.dtype) != (value.shape, value.dtype):
            raise CheckpointMismatchError(
                f"{directory}: tensor '{name}' is {saved.dtype} {tuple(saved.shape)}, the model "
                f"needs {value.dtype} {tuple(value.shape)}."
            )
    for name in tensors:
        if name not in expected:
            raise CheckpointMismatchError(
                f"{directory}: tensor '{name}' has no place in the model; {suggest(name, expected)}"
            )


def _check_ties(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], directory: str | Path
) -> None:
    """Refuse names of one tensor that were saved with values of their own."""
    for name, first in _aliases(expected, Path(directory)).items():
        if tensors[name] is not tensors[first] and not torch.equal(tensors[name], tensors[first]):
            raise CheckpointMismatchError(
                f"{directory}: '{first}' and '{name}' are one tensor in this model, and two in the "
                "one that was saved; build it without tying them."
            )


def _share_tied_weights(conversion: Conversion, tied: Mapping[str, str]) -> None:
    """Let layers that shared a weight when they were saved share it again."""
    layers = dict(conversion.model.named_modules(remove_duplicate=False))
    for name, source in tied.items():
        layer, other = (layers.get(key.removesuffix(".weight")) for key in (name, source))
        if isinstance(layer, ConvertedLayer) and isinstance(other, ConvertedLayer):
            layer.share_weight(other)


def _without_overlaps(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors, no two in the same memory, as safetensors demands."""
    seen: set[int] = set()
    found = {}
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if tensor.numel() and memory in seen else tensor
        seen.add(memory)
    return found


def _aliases(state: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """Return name -> first name under which the same tensor appears, for all later names."""
    first: dict[tuple[Any, ...], str] = {}
    found: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{directory}: cannot hold '{name}' of the model's state, a "
                f"{type(value).__name__}; only tensors are saved."
            )
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and key in first:
            found[name] = first[key]
        else:
            first[key] = name
    return found
