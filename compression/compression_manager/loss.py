"""Named, weighted loss terms and their sum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from compression_manager.errors import ConfigError, LossError

TASK_TERM = "task"


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One summand: `weight * value`.

    Attributes:
        name: unique within a step, for example `task` or `distillation/KL`.
        value: unweighted scalar tensor.
        weight: factor, a number or a scalar tensor.
    """

    name: str
    value: Tensor
    weight: float | Tensor


class LossTerms:
    """The terms of one loss call; plugins add theirs, the manager sums them.

    Args:
        task_loss: the scalar that the user's own criterion gave.
        task_weight: the factor that plugins agreed on at prepare.
    """

    def __init__(self, task_loss: Tensor, task_weight: float = 1.0) -> None:
        check_scalar(TASK_TERM, task_loss)
        self._task_weight = task_weight
        self._terms = {TASK_TERM: LossTerm(TASK_TERM, task_loss, task_weight)}

    def add(self, name: str, value: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add the term `weight * value`.

        Args:
            name: unique name of the term within this loss call.
            value: floating-point tensor with one element.
            weight: factor, a number or a scalar tensor.

        Raises:
            ConfigError: the name is taken.
            LossError: the value is not a floating-point scalar.
        """
        if name in self._terms:
            raise ConfigError(
                f"loss term '{name}' was added twice in one step; give each plugin instance "
                f"its own name. Terms so far: {', '.join(self._terms)}."
            )
        check_scalar(name, value)
        self._terms[name] = LossTerm(name, value, weight)

    def __iter__(self) -> Iterator[LossTerm]:
        return iter(self._terms.values())

    @property
    def are_changed(self) -> bool:
        """Whether plugins made the total another loss than the task's."""
        return len(self._terms) > 1 or self._task_weight != 1.0

    def total(self) -> Tensor:
        """Return the weighted sum as a 0-dimensional tensor.

        Raises:
            LossError: the sum is NaN or infinite; the message names the terms at fault.
        """
        terms = iter(self)
        total = _weighted(next(terms))
        for term in terms:
            total = total + _weighted(term)
        if not math.isfinite(total.item()):
            values = ", ".join(
                f"{term.name} = {float(term.value.detach()):g} (weight {_number(term.weight):g})"
                for term in self
            )
            raise LossError(
                f"the loss is not finite: {values}. Check the inputs and the learning rate; "
                "no gradient was computed and no parameter was changed."
            )
        return total


def _number(weight: float | Tensor) -> float:
    # Torch warns where a trained weight becomes a number.
    return float(weight.detach()) if isinstance(weight, Tensor) else weight


def _weighted(term: LossTerm) -> Tensor:
    value = term.value if term.value.dim() == 0 else term.value.reshape(())
    is_one = not isinstance(term.weight, Tensor) and term.weight == 1.0
    return value if is_one else term.weight * value


def check_scalar(name: str, value: object) -> None:
    """Raise LossError unless `value` is a floating-point tensor with a single element."""
    if not isinstance(value, Tensor):
        advice = "pass the criterion's result before calling .item() or float() on it"
        if isinstance(value, Mapping):
            advice = "pass the sum of its values"
        elif isinstance(value, (list, tuple)):
            advice = "pass the sum of its items"
        raise LossError(
            f"loss term '{name}' must be a scalar tensor, got {type(value).__name__}; {advice}."
        )
    if value.numel() != 1 or not value.is_floating_point():
        raise LossError(
            f"loss term '{name}' must be a floating-point scalar, got shape "
            f"{tuple(value.shape)} and dtype {value.dtype}; reduce it with .mean() or .sum()."
        )
