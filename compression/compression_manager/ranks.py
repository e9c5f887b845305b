"""What the ranks of torch.distributed hold, taken together.

All ranks have to call the collectives equally often and in the same order. They run on the
default process group, wait for no value on the host, and leave every rank with the same bits.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

# Whether torch was built with it.
_IS_AVAILABLE = dist.is_available()


def is_distributed() -> bool:
    """Return whether there is a process group, so that the model may be wrapped in DDP."""
    return _IS_AVAILABLE and dist.is_initialized()


def has_other_ranks() -> bool:
    """Return whether there is a process group of more than one rank."""
    return is_distributed() and dist.get_world_size() > 1


def maximum_of_ranks(values: Tensor) -> Tensor:
    """Overwrite `values` by the elementwise maximum over all ranks, and return it.

    Args:
        values: equal shape and dtype on all ranks, contiguous. What NaN gives depends on the
            backend; elements beside it are not affected.
    """
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def values_of_first_rank(values: Tensor) -> Tensor:
    """Overwrite `values` by those of rank 0, and return it."""
    dist.broadcast(values, src=0)
    return values


def mean_of_ranks(values: Tensor) -> Tensor:
    """Overwrite `values` (floating point) by the mean over all ranks, and return it."""
    return sum_of_ranks(values).div_(dist.get_world_size())


def sum_of_ranks(values: Tensor) -> Tensor:
    """Overwrite `values` by the elementwise sum over all ranks, and return it.

    Args:
        values: equal shape and dtype on all ranks, contiguous.
    """
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values
