"""What a forward pass keeps for its backward pass."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

MIB = 2**20


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes alive after `forward` because of it, each storage counted once.

    Counts what autograd saved, and every other new tensor that Python still reaches, such as one
    that an autograd function put on its context or a module caches, because those occupy memory
    just as well. Parameters and buffers of the model, and whatever was alive before, do not count.
    """
    known = [tensor.untyped_storage() for tensor in (*_reachable(), *_own(model))]
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    before = {storage.data_ptr() for storage in known}
    after = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in (*saved, *_reachable(), output))
    }
    # Buffers such as a moving average may have been replaced.
    before |= {tensor.untyped_storage().data_ptr() for tensor in _own(model)}
    return sum(count for address, count in after.items() if address not in before)


def _own(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _reachable() -> list[Tensor]:
    gc.collect()
    with warnings.catch_warnings():
        # Some objects warn when they are asked for their class.
        warnings.simplefilter("ignore")
        found = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    return [tensor for tensor in found if _has_storage(tensor)]


def _has_storage(tensor: Tensor) -> bool:
    if isinstance(tensor, FakeTensor):  # left by a compiler; torch warns of looking at its storage
        return False
    try:
        tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or oneDNN's own layout
        return False
    return tensor.device.type != "meta"
