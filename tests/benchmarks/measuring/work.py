"""How much a computation multiplies, and how many bytes it moves, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_MOVE_NOTHING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
}
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass
class Work:
    """What operators did.

    Attributes:
        operations: multiplications and additions of matrix products and convolutions.
        product_bytes: what those read and wrote.
        pass_bytes: what all other operators read and wrote, each tensor once per operator.
    """

    operations: int = 0
    product_bytes: int = 0
    pass_bytes: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        packet = function._overloadpacket
        if _only_looks(function) or packet.__name__ in _MOVE_NOTHING:
            return output
        moved = sum(_bytes(tensor) for tensor in _tensors((args, kwargs)))
        moved += sum(_bytes(tensor) for tensor in _tensors(output))
        if _is_product(packet):
            self.work.product_bytes += moved
            self.work.operations += _operations(packet, args, kwargs, output)
        else:
            self.work.pass_bytes += moved
        return output


def count_work(call: Callable[[], object]) -> Work:
    """Run `call` and return what its operators did, backward passes included.

    Products of integers are known by their names only, and add bytes but no operations, which
    are those of the same product in float. What native code does inside one operator is not seen.
    """
    with _Counter() as counter:
        call()
    return counter.work


def _is_product(packet: Any) -> bool:
    named = packet.__name__.startswith((_ATTENTION, "_int_mm", "qlinear", "qconv"))
    return named or packet in flop_registry


def _operations(packet: Any, args: Any, kwargs: Any, output: Any) -> int:
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=output))
    # torch knows the operations of attention on a GPU only.
    if packet.__name__ == _ATTENTION:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet.__name__ == f"{_ATTENTION}_backward":
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    return 0


def _only_looks(function: Any) -> bool:
    """Return whether an operator returns views of what it was given, and moves nothing."""
    aliases = [value.alias_info for value in function._schema.returns]
    return bool(aliases) and all(info is not None and not info.is_write for info in aliases)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    # A dimension that was only expanded lies in memory once.
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()
