"""Distillation losses: pure functions on tensors.

Logits are (*, classes) with the classes last; a loss is the mean over all other positions
("batch mean"), times temperature^2, so that gradients keep their size when the temperature
changes (Hinton et al. 2015, section 2). Computed, and returned, in float32 at least.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from compression_manager.errors import ConfigError


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 * mean KL(softmax(teacher / T) || softmax(student / T)).

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", up to the
    teacher's entropy, which has no gradient.

    Args:
        student: (*, classes) float logits.
        teacher: same shape; no gradient flows into it.
        temperature: positive.

    Returns:
        Scalar, 0 where both distributions are equal.

    Raises:
        ConfigError: the shapes differ, or the temperature is not a finite number above 0.
    """
    log_student, log_teacher = _log_softmax_pair(student, teacher, temperature)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return divergence.mean() * temperature**2


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 * mean cross-entropy of softmax(student / T) against softmax(teacher / T).

    Source: Hinton et al. 2015, equation 2. Equals `kd_loss` plus the teacher's entropy. Arguments
    and errors as for `kd_loss`.
    """
    log_student, log_teacher = _log_softmax_pair(student, teacher, temperature)
    return -(log_teacher.exp() * log_student).sum(-1).mean() * temperature**2


def mse_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 * mean over all elements of (student / T - teacher / T)^2.

    The factors cancel: the temperature has no effect. Source: Ba, Caruana 2014, "Do Deep Nets
    Really Need to be Deep?", equation 2. Arguments and errors as for `kd_loss`.
    """
    _check(student, teacher, temperature)
    student, teacher = _at_least_float32(student), _at_least_float32(teacher.detach())
    return F.mse_loss(student, teacher)


def _log_softmax_pair(
    student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    _check(student, teacher, temperature)
    student, teacher = _at_least_float32(student), _at_least_float32(teacher.detach())
    return F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.element_size() >= 4 else logits.float()


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.shape != teacher.shape:
        raise ConfigError(
            f"student logits have shape {tuple(student.shape)}, teacher logits "
            f"{tuple(teacher.shape)}; both must be equal, with the classes last."
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature must be a finite number above 0, got {temperature}.")
