"""Divergences between the distributions of logits, one value per position.

A divergence is a sum over classes, so that it can be applied to all classes or to a slice of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_plugins.distillation.losses.common import (
    Temperature,
    check_logits,
    checked_temperature,
    per_class,
    promoted,
)


class Divergence(Protocol):
    """A sum over classes of a function of both probabilities."""

    def value(self, log_student: Tensor, log_teacher: Tensor) -> Tensor:
        """Return the sum over the last dimension: (*, classes) -> (*)."""

    def slope(self, log_student: Tensor, log_teacher: Tensor) -> Tensor:
        """Return s * d(value)/ds per class for student probabilities s, up to a multiple of s."""


@dataclass(frozen=True)
class ForwardKL:
    """KL(teacher || student), the teacher smoothed to (1 - e) p + e / classes."""

    classes: int
    label_smoothing: float = 0.0

    def value(self, log_student: Tensor, log_teacher: Tensor) -> Tensor:
        target, log_target = self.target(log_teacher)
        return (target * (log_target - log_student)).sum(-1)

    def slope(self, log_student: Tensor, log_teacher: Tensor) -> Tensor:
        return -self.target(log_teacher)[0]

    def target(self, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smoothed probabilities and their logarithms."""
        if self.label_smoothing == 0:
            return log_teacher.exp(), log_teacher
        smoothing = self.label_smoothing
        target = (1 - smoothing) * log_teacher.exp() + smoothing / self.classes
        return target, target.log()


@dataclass(frozen=True)
class ReverseKL:
    """KL(student || teacher)."""

    def value(self, log_student: Tensor, log_teacher: Tensor) -> Tensor:
        return self.slope(log_student, log_teacher).sum(-1)

    def slope(self, log_student: Tensor, log_teacher: Tensor) -> Tensor:
        return log_student.exp() * (log_student - log_teacher)


@dataclass(frozen=True)
class JensenShannon:
    """beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S."""

    beta: float

    def value(self, log_student: Tensor, log_teacher: Tensor) -> Tensor:
        log_mixture = self._log_mixture(log_student, log_teacher)
        teacher = log_teacher.exp() * (log_teacher - log_mixture)
        student = log_student.exp() * (log_student - log_mixture)
        return (self.beta * teacher + (1 - self.beta) * student).sum(-1)

    def slope(self, log_student: Tensor, log_teacher: Tensor) -> Tensor:
        log_mixture = self._log_mixture(log_student, log_teacher)
        return (1 - self.beta) * log_student.exp() * (log_student - log_mixture)

    def _log_mixture(self, log_student: Tensor, log_teacher: Tensor) -> Tensor:
        return torch.logaddexp(
            log_teacher + math.log(self.beta), log_student + math.log1p(-self.beta)
        )


def log_probabilities(
    student: Tensor, teacher: Tensor, temperature: Temperature
) -> tuple[Tensor, Tensor, Temperature]:
    """Check the arguments; return both log-softmaxes in float32 at least, and the temperature."""
    check_logits(student, teacher)
    student, teacher = promoted(student, teacher)
    temperature = checked_temperature(temperature, student)
    divisor = per_class(temperature)
    return F.log_softmax(student / divisor, -1), F.log_softmax(teacher / divisor, -1), temperature
