"""Several teachers that answer as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.configuration.checks import (
    require_choice,
    require_not_negative,
    require_type,
)
from compression_manager.errors import CheckpointMismatchError, ConfigError
from compression_plugins.distillation.classes import dimension_of_classes
from compression_plugins.distillation.outputs import find_logits

OWNER = "EnsembleTeacher"

# Modes that have no use for weights.
UNWEIGHTED = ("maximum", "median")


class EnsembleTeacher(nn.Module):
    """Combines the predictions of several trained teachers into one distribution.

    `forward` takes what every teacher takes, and returns logits (*, classes), in float32 at least,
    whose softmax is the combined distribution; they are its log-probabilities. With p_i the
    softmax of teacher i's logits and w_i its weight (divided by their sum):

    - `average`: sum_i w_i * p_i, the mixture (Hinton et al. 2015, section 1; You et al. 2017,
      "Learning from Multiple Teacher Networks").
    - `geometric`: proportional to exp(sum_i w_i * log p_i), the product of experts (Hinton 1999,
      "Products of Experts"). Averages log-probabilities, so that a constant that one teacher adds
      to its logits changes nothing.
    - `maximum`: proportional to the largest p_i of each class.
    - `median`: proportional to the median of the p_i of each class; of an even number, the mean of
      the middle two.

    All is computed with log-probabilities: finite logits of any size give finite results. A logit
    of minus infinity is a probability of 0; where the combined one is 0 for every class, the
    result is NaN.

    The teachers are combined at temperature 1. A criterion with temperature T divides the combined
    log-probabilities by T, as it divides the logits of a single teacher.

    As a teacher of `DistillationConfig` it is frozen and stays in eval mode, with all its members.
    A teacher of weight 0 is not run. Weights and mode are part of the state, so that a checkpoint
    recognizes them.

    Args:
        teachers: at least one; the same object may come twice. All predict the same classes.
        weights: one number of at least 0 per teacher, not all 0; default: equal. Refused for
            `maximum` and `median`.
        mode: `average`, `geometric`, `maximum` or `median`.
        output: key or index of the logits in what each teacher returns; default: found.
        class_dimension: dimension of the logits that holds the classes, for example 1 for images
            (N, classes, height, width); default: the last one of logits of two or three dimensions.

    Attributes:
        teachers: the members, in order.
        weights: the members' weights, of sum 1.
        mode: how they are combined.

    Raises:
        ConfigError: an argument is invalid.
    """

    def __init__(
        self,
        teachers: Iterable[nn.Module],
        weights: Sequence[float] | None = None,
        mode: str = "average",
        *,
        output: str | int | None = None,
        class_dimension: int | None = None,
    ) -> None:
        super().__init__()
        require_choice(OWNER, "mode", mode, COMBINATIONS)
        self.teachers = nn.ModuleList(_checked_teachers(teachers))
        if weights is not None and mode in UNWEIGHTED:
            raise ConfigError(
                f"{OWNER}.weights has no use with mode='{mode}', which looks at single teachers; "
                "drop it, or choose the mode average or geometric."
            )
        self.weights = _checked_weights(weights, len(self.teachers))
        self.mode = mode
        self._output = output
        self._class_dimension = class_dimension

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the combined log-probabilities, in the shape of the teachers' logits.

        Raises:
            ConfigError: a teacher's output holds no logits, theirs differ in shape, or it has to
                be said which dimension holds the classes.
        """
        logits = {
            index: self._logits(index, args, kwargs)
            for index, weight in enumerate(self.weights)
            if weight > 0
        }
        _check_shapes(logits)
        first = next(iter(logits.values()))
        classes = self._dimension_of_classes(first)
        # Teachers may lie on several devices.
        parts = [
            F.log_softmax(_at_least_float32(item.to(first.device)), classes)
            for item in logits.values()
        ]
        weights = [self.weights[index] for index in logits]
        combined = COMBINATIONS[self.mode](torch.stack(_of_one_dtype(parts)), weights)
        return F.log_softmax(combined, classes)

    def extra_repr(self) -> str:
        """Return mode and weights, for `print`."""
        return f"mode={self.mode!r}, weights={list(self.weights)}"

    def get_extra_state(self) -> Tensor:
        """Return the mode's number and the weights, (1 + teachers,) float64."""
        return torch.tensor(
            [list(COMBINATIONS).index(self.mode), *self.weights], dtype=torch.float64
        )

    def set_extra_state(self, state: Tensor) -> None:
        """Check that the state is that of an ensemble with this mode and these weights.

        Raises:
            CheckpointMismatchError: it is another one's.
        """
        if not torch.equal(state.cpu(), self.get_extra_state()):
            mode = list(COMBINATIONS)[int(state[0])]
            raise CheckpointMismatchError(
                f"the state is that of an {OWNER} with mode='{mode}' and weights "
                f"{state[1:].tolist()}; this one has {self.extra_repr()}."
            )

    def _dimension_of_classes(self, logits: Tensor) -> int:
        if logits.dim() > 3 and self._class_dimension is None:
            raise ConfigError(
                f"{OWNER} combines distributions over classes, and which dimension of logits of "
                f"shape {tuple(logits.shape)} holds these has to be said: class_dimension=1 for "
                "images (N, classes, height, width), class_dimension=-1 for the last one."
            )
        return dimension_of_classes(logits, self._class_dimension)

    def _logits(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        return find_logits(
            self.teachers[index](*args, **kwargs),
            self._output,
            where=f"ensemble's teacher {index}",
            owner=OWNER,
            option="output",
        )


def _average(log_probabilities: Tensor, weights: Sequence[float]) -> Tensor:
    return torch.logsumexp(log_probabilities + _column(weights, log_probabilities).log(), 0)


def _geometric(log_probabilities: Tensor, weights: Sequence[float]) -> Tensor:
    return (log_probabilities * _column(weights, log_probabilities)).sum(0)


def _maximum(log_probabilities: Tensor, weights: Sequence[float]) -> Tensor:
    return log_probabilities.amax(0)


def _median(log_probabilities: Tensor, weights: Sequence[float]) -> Tensor:
    # The logarithm keeps the order; only the mean of the middle two is one of probabilities. Its
    # factor 1/2 is the same for every class.
    ordered, count = log_probabilities.sort(0).values, len(log_probabilities)
    if count % 2:
        return ordered[count // 2]
    return torch.logaddexp(ordered[count // 2 - 1], ordered[count // 2])


# Mode -> function of log-probabilities (teachers, *, classes) and weights of sum 1, which returns
# unnormalized log-probabilities (*, classes). A state holds a mode's position: append only.
COMBINATIONS: dict[str, Callable[[Tensor, Sequence[float]], Tensor]] = {
    "average": _average,
    "geometric": _geometric,
    "maximum": _maximum,
    "median": _median,
}


def _column(weights: Sequence[float], like: Tensor) -> Tensor:
    column = torch.tensor(weights, dtype=like.dtype, device=like.device)
    return column.reshape(-1, *[1] * (like.dim() - 1))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.element_size() >= 4 else logits.float()


def _of_one_dtype(parts: list[Tensor]) -> list[Tensor]:
    widest = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    return [part.to(widest) for part in parts]


def _check_shapes(logits: Mapping[int, Tensor]) -> None:
    first, expected = next((index, item.shape) for index, item in logits.items())
    for index, item in logits.items():
        if item.shape != expected:
            raise ConfigError(
                f"{OWNER}: the logits of teacher {index} have shape {tuple(item.shape)}, those of "
                f"teacher {first} {tuple(expected)}; all must predict the same classes for the "
                "same batch."
            )


def _checked_teachers(teachers: Iterable[nn.Module]) -> list[nn.Module]:
    # A ModuleList and a Sequential are iterable; the latter is one model.
    single = isinstance(teachers, nn.Module) and not isinstance(teachers, nn.ModuleList)
    if single or not isinstance(teachers, Iterable):
        raise ConfigError(
            f"{OWNER}.teachers must be a list of models, got a {type(teachers).__name__}."
        )
    members = list(teachers)
    if not members:
        raise ConfigError(f"{OWNER}.teachers must hold at least one model, got none.")
    for index, teacher in enumerate(members):
        require_type(OWNER, f"teachers[{index}]", teacher, nn.Module)
    return members


def _checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1 / count,) * count
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != count:
        raise ConfigError(
            f"{OWNER}.weights must be a list with a number for each of the {count} teachers, "
            f"got {weights!r}."
        )
    for index, weight in enumerate(weights):
        require_not_negative(OWNER, f"weights[{index}]", weight)
    largest = max(weights)
    if largest == 0:
        raise ConfigError(f"{OWNER}.weights must not all be 0, got {list(weights)}.")
    # By the largest first: the sum of huge weights overflows.
    scaled = [weight / largest for weight in weights]
    total = math.fsum(scaled)
    return tuple(weight / total for weight in scaled)
