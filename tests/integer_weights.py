"""Models whose weights are stored as integers, and numpy's reading of their state_dicts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from compression_manager.quantization import QuantizationScheme


class TiedModel(nn.Module):
    """An embedding whose weight is the output layer's; input (N,) indices, output (N, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input: Tensor) -> Tensor:
        """Return logits."""
        output: Tensor = self.head(self.middle(self.embedding(input)).relu())
        return output


def numpy_grid(
    weight: np.ndarray, scheme: QuantizationScheme
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, scale and zero point of `weight` by the min-max rule, each of its full shape."""
    shape = weight.shape
    rows = _rows(weight, scheme)
    low = np.minimum(rows.min(1), 0).astype(np.float32)
    high = np.maximum(rows.max(1), 0).astype(np.float32)
    if scheme.symmetric:
        top = 2 ** (scheme.bits - 1) - 1
        scale = np.maximum(-low, high) / np.float32(top)
        zero_point = np.zeros_like(scale)
        bottom = -top
    else:
        bottom, top = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
        scale = (high - low) / np.float32(2**scheme.bits - 1)
        scale = np.maximum(scale, np.float32(2.0**-23))
        zero_point = np.clip(bottom - np.rint(low / scale), bottom, top)
    scale = np.maximum(scale, np.float32(2.0**-23)).astype(np.float32)
    scale, zero_point = _spread(scale, shape, scheme), _spread(zero_point, shape, scheme)
    code = np.clip(np.rint(weight * (np.float32(1) / scale)) + zero_point, bottom, top)
    return code, scale, zero_point


def numpy_read(
    state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], scheme: QuantizationScheme
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers, scale and zero point as a state_dict has them, each of the full shape."""
    integers = state[name].numpy()
    count = int(np.prod(shape))
    if scheme.bits < 8:
        single = np.unpackbits(integers, bitorder="little")[: count * scheme.bits]
        powers = 2 ** np.arange(scheme.bits)
        integers = single.reshape(count, scheme.bits) @ powers + scheme.quant_min
    scale = state[f"{name}_scale"].numpy()
    zero_point = state.get(f"{name}_zero_point")
    offset = np.zeros_like(scale) if zero_point is None else zero_point.numpy()
    return (
        integers.reshape(shape).astype(np.float64),
        _spread(scale.reshape(-1), shape, scheme),
        _spread(offset.reshape(-1).astype(np.float64), shape, scheme),
    )


def _rows(weight: np.ndarray, scheme: QuantizationScheme) -> np.ndarray:
    """One row for each scale; a shorter last group is filled up with its own last value."""
    if scheme.granularity == "tensor":
        return weight.reshape(1, -1)
    if scheme.axis is not None:
        return np.moveaxis(weight, scheme.axis, 0).reshape(weight.shape[scheme.axis], -1)
    size = scheme.group_size or 1
    flat = weight.reshape(len(weight), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % size)), mode="edge")
    return flat.reshape(-1, size)


def _spread(value: np.ndarray, shape: tuple[int, ...], scheme: QuantizationScheme) -> np.ndarray:
    if scheme.granularity == "tensor":
        return np.broadcast_to(value.reshape(()), shape)
    if scheme.axis is not None:
        form = [1] * len(shape)
        form[scheme.axis] = -1
        return np.broadcast_to(value.reshape(form), shape)
    length = int(np.prod(shape[1:]))
    rows = np.repeat(value.reshape(shape[0], -1), scheme.group_size or 1, axis=1)
    return rows[:, :length].reshape(shape)


def state_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of a state_dict, as a file holds them."""
    return sum(item.numel() * item.element_size() for item in model.state_dict().values())


def leaves(output: object) -> list[Tensor]:
    """The tensors of a nested output."""
    return [item for item in torch.utils._pytree.tree_leaves(output) if isinstance(item, Tensor)]
