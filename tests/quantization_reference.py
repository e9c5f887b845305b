"""Quantization written once more in numpy, and short loops; shared by tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compression_manager import CompressionManager, prepare_compression
from compression_manager.models.calling import call_model, tensors_in
from compression_plugins.fake_quant import QATConfig

EPSILON = np.float32(2.0**-23)


def weight_grid(
    weight: np.ndarray, axis: int | None = 0, bits: int = 8
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Scale, zero point and range of symmetric signed weights, narrow range."""
    top = 2 ** (bits - 1) - 1
    if axis is None:
        largest = np.abs(weight).max()
    else:
        largest = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)).max(1)
    scale = np.maximum(np.float32(largest) / np.float32(top), EPSILON)
    return scale, np.zeros_like(scale), -top, top


def activation_grid(
    low: float, high: float, bits: int = 8
) -> tuple[np.float32, np.float32, int, int]:
    """Scale, zero point and range of affine unsigned activations."""
    top = 2**bits - 1
    low, high = np.float32(min(low, 0.0)), np.float32(max(high, 0.0))
    scale = np.maximum((high - low) / np.float32(top), EPSILON)
    return scale, np.clip(-np.rint(low / scale), 0, top), 0, top


def averaged_range(batches: Iterable[Tensor], constant: float = 0.01) -> tuple[Any, Any]:
    """The moving average of the batches' ranges, in float32."""
    low = high = None
    for batch in batches:
        new_low, new_high = np.float32(batch.min()), np.float32(batch.max())
        if low is None:
            low, high = new_low, new_high
        else:
            low = low + np.float32(constant) * (new_low - low)
            high = high + np.float32(constant) * (new_high - high)
    return low, high


def integers(values: np.ndarray, grid: tuple[Any, Any, int, int], axis: int | None) -> np.ndarray:
    """Unclipped integers of `values`, as float32."""
    scale, zero_point, _, _ = grid
    if axis is not None:
        shape = [1] * values.ndim
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return np.rint(values * (np.float32(1) / scale)) + zero_point


def fake_quantized(
    values: np.ndarray, grid: tuple[Any, Any, int, int], axis: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The quantized real numbers, and where the gradient passes."""
    scale, zero_point, low, high = grid
    unclipped = integers(values, grid, axis)
    code = np.clip(unclipped, low, high)
    if axis is not None:
        shape = [1] * values.ndim
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return ((code - zero_point) * scale).astype(np.float32), unclipped == code


def step(
    manager: CompressionManager,
    inputs: Any,
    index: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    criterion: Callable[[Any], Tensor] = lambda output: output.float().square().mean(),
) -> Any:
    """One step of the loop; the output of the model is returned."""
    manager.on_step_begin(index)
    output = call_model(manager.model, inputs)
    loss = manager.on_after_compute_loss(inputs, output, criterion(output))
    if loss.requires_grad:
        loss.backward()
    manager.on_before_optimizer_step()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    manager.on_after_optimizer_step()
    manager.on_step_end()
    return output


def prepared(
    model: nn.Module, batches: Iterable[Any] = (), *, example_inputs: Any = None, **options: Any
) -> CompressionManager:
    """A manager with QAT in an epoch, after one step per batch (no optimizer)."""
    manager = prepare_compression(model, [QATConfig(**options)], example_inputs=example_inputs)
    model.train()
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for index, batch in enumerate(batches):
        step(manager, batch, index)
    return manager


def trained(model: nn.Module, inputs: Any, *, steps: int = 3, **options: Any) -> CompressionManager:
    """A manager whose model was trained by SGD on one batch."""
    manager = prepare_compression(model, [QATConfig(**options)])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for index in range(steps):
        step(manager, inputs, index, optimizer, _total_square)
    return manager


def _total_square(output: Any) -> Tensor:
    floats = (item for item in tensors_in(output) if item.is_floating_point())
    return torch.stack([item.float().square().mean() for item in floats]).sum()
