"""Learning-rate schedulers that were built before a group was added to their optimizer.

torch's schedulers keep lists with one entry per group and compare their lengths at every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.optim import Optimizer

from compression_manager.errors import ConfigError

# Of all schedulers in torch.optim; those of other libraries derive from LambdaLR or LRScheduler.
_PER_GROUP = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)


def check_known(optimizer: Optimizer, tracked: Iterable[Any]) -> None:
    """Refuse a scheduler that was built before the group and cannot be told about it.

    Raises:
        ConfigError: the optimizer has a scheduler, and none of those tracked is it.
    """
    # What torch itself marks an optimizer with when a scheduler is built for it.
    has_scheduler = hasattr(optimizer.step, "_wrapped_by_lr_sched")
    if has_scheduler and not any(_schedulers(optimizer, tracked)):
        raise ConfigError(
            "a learning-rate scheduler was built before the optimizer got the parameters that "
            "plugins created, and would fail at its next step; register both in one call, "
            "manager.track(optimizer=optimizer, scheduler=scheduler), or call "
            "manager.track(optimizer=optimizer) before building the scheduler."
        )


def append_group(optimizer: Optimizer, tracked: Iterable[Any]) -> None:
    """Give the schedulers of `optimizer` entries for its new last group, those of the first.

    The rates themselves have no meaning: the group's rate follows that of the first group.
    """
    groups = len(optimizer.param_groups)
    for values in _lists(optimizer, tracked):
        if len(values) == groups - 1:
            values.append(values[0])


def remove_group(optimizer: Optimizer, index: int, tracked: Iterable[Any]) -> None:
    """Delete the entries of the group that was number `index`."""
    groups = len(optimizer.param_groups)
    for values in _lists(optimizer, tracked):
        if len(values) == groups + 1:
            del values[index]


def _lists(optimizer: Optimizer, tracked: Iterable[Any]) -> Iterator[list[Any]]:
    seen: set[int] = set()
    for scheduler in _schedulers(optimizer, tracked):
        for name in _PER_GROUP:
            values = vars(scheduler).get(name)
            # Composed schedulers share one list of last rates.
            if isinstance(values, list) and id(values) not in seen:
                seen.add(id(values))
                yield values


def _schedulers(optimizer: Optimizer, candidates: Iterable[Any]) -> Iterator[Any]:
    """Yield the schedulers of `optimizer` among `candidates`, and those that they consist of."""
    for value in candidates:
        # What wraps an optimizer, as accelerate does, has the very list of its groups.
        groups = getattr(getattr(value, "optimizer", None), "param_groups", None)
        if groups is optimizer.param_groups and hasattr(value, "get_last_lr"):
            yield value
        # Of torch's composed schedulers, and of accelerate's, which wraps another.
        parts = getattr(value, "_schedulers", None) or [getattr(value, "scheduler", None)]
        if isinstance(parts, (list, tuple)):
            yield from _schedulers(optimizer, (part for part in parts if part is not None))
