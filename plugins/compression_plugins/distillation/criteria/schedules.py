"""Temperatures and weights that change while the student learns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from compression_manager.configuration.checks import (
    require_choice,
    require_integer,
    require_not_negative,
    require_positive,
)
from compression_manager.errors import ConfigError
from compression_manager.plugin import option


class Schedule(ABC):
    """A number that stands in the place of a fixed temperature or weight.

    Third parties derive their own; one that takes part in recipes is a frozen dataclass.
    """

    @abstractmethod
    def value(self, global_step: int, teacher_logits: Tensor | None) -> float | Tensor:
        """Return the value for the present loss.

        Args:
            global_step: optimizer steps completed.
            teacher_logits: (*, classes) of this batch, or None where what is compared are no
                logits.

        Returns:
            A number; or one for each position of the batch, shape (*), float32.
        """

    @abstractmethod
    def limits(self) -> tuple[float, float]:
        """Return the smallest and the largest value there can be."""


@dataclass(frozen=True)
class _Way(Schedule):
    """From one value to another within a number of steps."""

    start: float = field(metadata=option("Value up to the step `begin`."))
    end: float = field(metadata=option("Value from the step `begin + steps` on."))
    steps: int = field(metadata=option("Optimizer steps that the way takes."))
    begin: int = field(default=0, metadata=option("Optimizer steps before it starts."))

    def __post_init__(self) -> None:
        require_not_negative(self, "start", self.start)
        require_not_negative(self, "end", self.end)
        require_integer(self, "steps", self.steps, minimum=1)
        require_integer(self, "begin", self.begin, minimum=0)

    def value(self, global_step: int, teacher_logits: Tensor | None) -> float:
        """Return the value at `global_step`."""
        progress = min(max((global_step - self.begin) / self.steps, 0.0), 1.0)
        return self.start + (self.end - self.start) * self.share(progress)

    def limits(self) -> tuple[float, float]:
        """Return the smallest and the largest value there can be."""
        return min(self.start, self.end), max(self.start, self.end)

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return how much of the way is done, 0 to 1, after a share `progress` of the steps."""


@dataclass(frozen=True)
class LinearSchedule(_Way):
    """From `start` to `end` in equal steps: start + (end - start) * progress."""

    def share(self, progress: float) -> float:
        """Return `progress`."""
        return progress


@dataclass(frozen=True)
class CosineSchedule(_Way):
    """From `start` to `end` along half a cosine: slow, fast, slow."""

    def share(self, progress: float) -> float:
        """Return (1 - cos(pi * progress)) / 2."""
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class CurriculumSchedule(Schedule):
    """Stages, each with a value of its own: easy ones first, for example 8, 4 and then 2."""

    values: tuple[float, ...] = field(metadata=option("Value of each stage."))
    boundaries: tuple[int, ...] = field(
        metadata=option("Optimizer step at which each stage but the first begins, ascending.")
    )

    def __post_init__(self) -> None:
        for name in ("values", "boundaries"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"CurriculumSchedule.{name} must be a list, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        for index, value in enumerate(self.values):
            require_not_negative(self, f"values[{index}]", value)
        for index, step in enumerate(self.boundaries):
            require_integer(self, f"boundaries[{index}]", step, minimum=1)
        if len(self.values) != len(self.boundaries) + 1 or len(self.values) < 2:
            raise ConfigError(
                f"CurriculumSchedule has {len(self.values)} values and {len(self.boundaries)} "
                "boundaries; it takes at least two values, and one boundary less than values."
            )
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ConfigError(
                f"CurriculumSchedule.boundaries must ascend, got {list(self.boundaries)}."
            )

    def value(self, global_step: int, teacher_logits: Tensor | None) -> float:
        """Return the value of the stage that `global_step` lies in."""
        stage = sum(global_step >= boundary for boundary in self.boundaries)
        return self.values[stage]

    def limits(self) -> tuple[float, float]:
        """Return the smallest and the largest value there can be."""
        return min(self.values), max(self.values)


@dataclass(frozen=True)
class AdaptiveSchedule(Schedule):
    """A value for each sample, by how sure the teacher is of it: low + (high - low) * c.

    `confidence`: c is the teacher's largest probability, scaled so that the uniform distribution
    has 0 and certainty has 1. `entropy`: c is the teacher's entropy divided by its largest
    possible value, log(classes), so that the uniform distribution has 1. As a weight, the mean
    over the batch is taken, of tokens over those that count. `low` may be the larger of the two.
    All of the teacher's logits are looked at in float32 at once, which `chunk_size` does not bound.
    """

    low: float = field(metadata=option("Value where c is 0."))
    high: float = field(metadata=option("Value where c is 1."))
    by: Literal["confidence", "entropy"] = field(
        default="confidence", metadata=option("What c is: the teacher's confidence or entropy.")
    )

    def __post_init__(self) -> None:
        require_not_negative(self, "low", self.low)
        require_not_negative(self, "high", self.high)
        require_choice(self, "by", self.by, ("confidence", "entropy"))

    def value(self, global_step: int, teacher_logits: Tensor | None) -> Tensor:
        """Return a value for each position, float32 in the shape of the positions.

        Raises:
            ConfigError: there are no logits, or they have a single class.
        """
        if teacher_logits is None or teacher_logits.shape[-1] < 2:
            raise ConfigError(
                "AdaptiveSchedule follows the teacher's logits of at least two classes, which are "
                "not what is compared here; use LinearSchedule, CosineSchedule or "
                "CurriculumSchedule."
            )
        logarithms = torch.log_softmax(teacher_logits.detach().float(), -1)
        classes = logarithms.shape[-1]
        if self.by == "confidence":
            share = (logarithms.amax(-1).exp() * classes - 1.0) / (classes - 1.0)
        else:
            # 0 * -inf of an impossible class is 0.
            entropy = -torch.where(logarithms.isinf(), 0.0, logarithms.exp() * logarithms).sum(-1)
            share = entropy / math.log(classes)
        return self.low + (self.high - self.low) * share.clamp(0.0, 1.0)

    def limits(self) -> tuple[float, float]:
        """Return the smallest and the largest value there can be."""
        return min(self.low, self.high), max(self.low, self.high)


SCHEDULES: dict[str, type[Schedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "curriculum": CurriculumSchedule,
    "adaptive": AdaptiveSchedule,
}


def value_at(
    number: float | Schedule, global_step: int, teacher_logits: Tensor | None
) -> float | Tensor:
    """Return what a fixed number or a schedule says now."""
    return number.value(global_step, teacher_logits) if isinstance(number, Schedule) else number


def weight_at(
    number: float | Schedule,
    global_step: int,
    teacher_logits: Tensor | None,
    counted: Tensor | None = None,
) -> float | Tensor:
    """Return a weight as a number or a scalar tensor.

    Of values per position it is their mean over those where `counted`, bool, is true; default: all.
    """
    value = value_at(number, global_step, teacher_logits)
    if not isinstance(value, Tensor):
        return value
    if counted is None:
        return value.mean()
    return value.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def require_temperature(owner: object, field: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number above 0, or a schedule of such."""
    require_positive(owner, field, _smallest(value))


def require_weight(owner: object, field: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number of at least 0, or a schedule of such."""
    require_not_negative(owner, field, _smallest(value))


def _smallest(value: object) -> object:
    return value.limits()[0] if isinstance(value, Schedule) else value
