"""Every scheduler of torch works on an optimizer that got a group, whichever was built first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.optim.lr_scheduler as lr
from torch.optim.swa_utils import SWALR

import toys
from compression_manager import ConfigError, prepare_compression
from parameter_creators import creator, step
from probes import probe

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.1, 0.4, 2),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.4, 10),
    "ReduceLROnPlateau": lambda o: lr.ReduceLROnPlateau(o, patience=0, min_lr=[0.01]),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=3),
    "SequentialLR": lambda o: lr.SequentialLR(
        o, [lr.LinearLR(o, 0.1, total_iters=2), lr.CosineAnnealingLR(o, 4)], [2]
    ),
    "ChainedScheduler": lambda o: lr.ChainedScheduler(
        [lr.LinearLR(o, 0.1, total_iters=2), lr.LambdaLR(o, lambda step: 0.9**step)], optimizer=o
    ),
}


def _rates(kind: str, tracked: str) -> tuple[list[float], list[float]]:
    """Return the rates of first and last group at each of 6 optimizer steps."""
    torch.manual_seed(0)
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    plugin = probe() if tracked == "alone" else creator(learning_rate_factor=0.25)
    manager = prepare_compression(model, [plugin])
    if tracked == "before the scheduler":
        manager.track(optimizer=optimizer)
    if kind == "ReduceLROnPlateau" and tracked == "before the scheduler":
        # Only this one of them is given a list, which the user then makes as long as need be.
        scheduler: Any = lr.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.01, 0.01])
    else:
        scheduler = SCHEDULERS[kind](optimizer)
    manager.track(optimizer=optimizer, scheduler=scheduler)
    seen: list[list[float]] = []
    hook = optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append([g["lr"] for g in optimizer.param_groups])
    )
    manager.on_train_begin()
    for number in range(6):
        step(manager, optimizer, number, scheduler)
    manager.close()
    hook.remove()
    assert len(optimizer.param_groups) == 1
    # The lists of the scheduler are as long as before.
    optimizer.step()
    scheduler.step(*((1.0,) if kind == "ReduceLROnPlateau" else ()))
    assert len(scheduler.get_last_lr()) == 1
    return [rates[0] for rates in seen], [rates[-1] for rates in seen]


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("tracked", ["before the scheduler", "with the scheduler"])
def test_every_scheduler_moves_the_first_group_and_the_own_one_follows(
    kind: str, tracked: str
) -> None:
    alone, _ = _rates(kind, "alone")
    assert len(set(alone)) > 1
    first, own = _rates(kind, tracked)
    assert first == alone
    assert own == [rate * 0.25 for rate in first]


class Wrapper(torch.optim.Optimizer):
    """An optimizer that hands on everything to another, as accelerate's does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # a property, as accelerate's
        return self.optimizer.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@pytest.mark.parametrize("tracks_wrapper", [True, False])
def test_a_scheduler_of_what_wraps_the_optimizer_is_known(tracks_wrapper: bool) -> None:
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapper = Wrapper(optimizer)
    tracked, scheduled = (wrapper, optimizer) if tracks_wrapper else (optimizer, wrapper)
    scheduler = lr.StepLR(scheduled, 2)
    manager = prepare_compression(model, [creator()])
    manager.track(optimizer=tracked, scheduler=scheduler)
    assert len(scheduler.base_lrs) == 2


class WrappedScheduler:
    """A scheduler that hands on everything to another, as accelerate's does."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.state_dict, self.load_state_dict = scheduler.state_dict, scheduler.load_state_dict

    def get_last_lr(self) -> Any:
        return self.scheduler.get_last_lr()


def test_a_scheduler_inside_another_librarys_is_known() -> None:
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = lr.StepLR(optimizer, 2)
    manager = prepare_compression(model, [creator()])
    manager.track(optimizer=optimizer, scheduler=WrappedScheduler(scheduler))
    assert len(scheduler.base_lrs) == 2


def test_a_scheduler_that_is_not_tracked_is_refused() -> None:
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = lr.StepLR(optimizer, 2)
    manager = prepare_compression(model, [creator()])
    with pytest.raises(ConfigError, match=r"scheduler was built before.*scheduler=scheduler\)"):
        manager.track(optimizer=optimizer)
    assert len(optimizer.param_groups) == 1
    assert len(manager._context.tracked) == 0
    manager.track(scheduler=scheduler)
    manager.track(optimizer=optimizer)
    assert len(scheduler.base_lrs) == 2
