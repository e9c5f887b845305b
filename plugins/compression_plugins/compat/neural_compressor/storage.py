"""Saving and loading under Neural Compressor's names; no pickle is written or read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from compression_manager import deploy
from compression_manager.configuration.checks import as_path
from compression_manager.errors import CheckpointError, CheckpointMismatchError, ConfigError
from compression_manager.state import atomic_directory, verify_directory
from compression_plugins.compat.neural_compressor.model import unwrapped

FLOAT_FORMAT = "compression_plugins.compat.neural_compressor"
DEFAULT_DIRECTORY = "nc_workspace"
_TENSORS = "model.safetensors"
_CONVERTED = "quantization.json"


def save_float(model: nn.Module, directory: str | Path) -> Path:
    """Write the tensors of a model that nothing quantizes; replaces an earlier one.

    Returns:
        The directory: `model.safetensors` and `manifest.json`.

    Raises:
        CheckpointError: it cannot be written, or would replace something else.
    """
    folder = as_path("save", directory)
    with atomic_directory(folder, format_name=FLOAT_FORMAT) as temporary:
        safetensors.torch.save_model(model, str(temporary / _TENSORS))
    return folder


def load(
    checkpoint_dir: str | Path | None = None,
    model: nn.Module | None = None,
    layer_wise: bool = False,
    history_cfg: Any = None,
    **arguments: Any,
) -> nn.Module:
    """Change a float model into the one that `save` wrote.

    Args:
        checkpoint_dir: the directory.
        model: a fresh float model of the same architecture; its weights are replaced.
        layer_wise: only False; belongs to weight-only quantization.
        history_cfg: only None; belongs to the search of `fit`.
        **arguments: such as `dataloader`, with which 2.6 traced the model; not needed.

    Returns:
        `model`, in eval mode, with int8 layers if it was quantized.

    Raises:
        CheckpointError: there is no such model, or it is corrupt.
        CheckpointMismatchError: it belongs to another architecture; the model is unchanged.
        ConfigError: an argument is missing or is not offered here.
    """
    if checkpoint_dir is None or not isinstance(model, nn.Module):
        raise ConfigError("load takes a directory and a float model: load(directory, model).")
    if layer_wise or history_cfg is not None or arguments.get("weight_only"):
        raise ConfigError("load offers neither layer_wise nor history_cfg nor weight_only here.")
    folder = as_path("load", checkpoint_dir)
    target: nn.Module = unwrapped(model)
    if (folder / "best_model.pt").exists():
        raise CheckpointError(
            f"{folder} holds best_model.pt, a pickle that Neural Compressor wrote; pickles are not "
            "read here. Train again, or load it there and save its float weights."
        )
    if (folder / _CONVERTED).exists():
        return deploy.load(folder, target)
    tensors = verify_directory(folder, format_name=FLOAT_FORMAT).path(_TENSORS)
    _check_names(target, safetensors.torch.load_file(tensors), folder)
    safetensors.torch.load_model(target, str(tensors))
    return target.eval()


def _check_names(model: nn.Module, saved: dict[str, Any], folder: Path) -> None:
    own = model.state_dict()
    for name, value in saved.items():
        shape = tuple(own[name].shape) if name in own else "nothing"
        if shape != tuple(value.shape):
            raise CheckpointMismatchError(
                f"{folder}: '{name}' has shape {tuple(value.shape)}; the model has {shape} there."
            )
    # Tensors that share their memory are saved once.
    held = {own[name].data_ptr() for name in saved}
    lacking = [name for name, value in own.items() if value.data_ptr() not in held | {0}]
    if lacking:
        raise CheckpointMismatchError(
            f"{folder} has nothing for {', '.join(map(repr, lacking))} of the model; load takes a "
            "model as it was when it was saved."
        )
