"""What `train` refuses before it changes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from compression_manager.errors import CheckpointError, ConfigError
from compression_manager.state import list_checkpoints


def check_optimizer(optimizer: object, student: nn.Module) -> None:
    """Raise ConfigError unless the optimizer trains every trainable parameter of the student."""
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"train takes a torch.optim.Optimizer as optimizer, got {type(optimizer).__name__}."
        )
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    trainable = [name for name, value in student.named_parameters() if value.requires_grad]
    missing = [
        name
        for name, value in student.named_parameters()
        if value.requires_grad and id(value) not in held
    ]
    if not trainable:
        raise ConfigError("the student has no parameter with requires_grad, so nothing is trained.")
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        advice = (
            "it was built for another model; build it from student.parameters()"
            if len(missing) == len(trainable)
            else "add them, or set requires_grad_(False) on what shall stay as it is"
        )
        raise ConfigError(
            f"the optimizer does not hold the student's parameter '{missing[0]}'{others}: {advice}."
        )


def check_scheduler(
    scheduler: Any, interval: object, optimizer: Optimizer, epochs: int, lower_is_better: bool
) -> None:
    """Raise ConfigError if the scheduler moves another optimizer, or at another pace."""
    if interval not in ("epoch", "step"):
        raise ConfigError(f"scheduler_interval takes 'epoch' or 'step', got {interval!r}.")
    if scheduler is None:
        return
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigError(
            f"train takes a torch.optim.lr_scheduler as scheduler, got {type(scheduler).__name__}."
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigError("the scheduler was built for another optimizer than the one given.")
    if isinstance(scheduler, OneCycleLR) and interval == "epoch" and scheduler.total_steps > epochs:
        raise ConfigError(
            f"the OneCycleLR scheduler has {scheduler.total_steps} steps, but is moved once in "
            f"each of {epochs} epochs; if its steps are optimizer steps, pass "
            "scheduler_interval='step'."
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        mode = "min" if lower_is_better else "max"
        if interval == "step" or scheduler.mode != mode:
            raise ConfigError(
                "a ReduceLROnPlateau scheduler follows the metric that decides which epoch is the "
                f"best: it needs scheduler_interval='epoch' and here mode={mode!r}, "
                f"got {interval!r} and mode={scheduler.mode!r}."
            )


def check_folder(directory: str | Path, *, resume: bool) -> None:
    """Raise CheckpointError if checkpoints are there and shall not be continued."""
    folder = Path(directory)
    found = list_checkpoints(folder) if folder.is_dir() and not resume else []
    if found:
        raise CheckpointError(
            f"{folder} already holds checkpoints of a training, the newest being "
            f"{found[-1].directory.name}. Continue it with train(..., resume=True), or choose "
            "another directory."
        )


def device_of(student: nn.Module) -> torch.device | None:
    """Return the device of the student's parameters, or None if they are on several."""
    devices = {parameter.device for parameter in student.parameters()}
    return devices.pop() if len(devices) == 1 else None
