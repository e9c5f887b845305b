"""Decoupled knowledge distillation: the target's probability and the others' apart."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.errors import ConfigError
from compression_plugins.distillation.losses.common import (
    Temperature,
    batch_mean,
    check_logits,
    checked_temperature,
    per_class,
    promoted,
)


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Return T^2 * mean of alpha * TCKD + beta * NCKD.

    TCKD is KL(teacher || student) of the two probabilities (target, all others); NCKD is
    KL(teacher || student) of the softmax over all classes but the target. With alpha = 1 and
    beta = the teacher's 1 - p[target] of each position it would be `kd_loss`. Source: Zhao, Cui,
    Song, Qiu, Liang 2022, "Decoupled Knowledge Distillation", equations 6 and 7; T^2 as in the
    authors' code. They leave the target out by subtracting 1000 from its logit; here it is left
    out exactly, so that logits of any size are right.

    Args:
        student: (*, classes) float logits, two classes at least.
        teacher: same shape; no gradient flows into it.
        target: (*) class indices, any integer dtype.
        alpha: weight of TCKD.
        beta: weight of NCKD. The authors choose it per teacher, from 1 to 10, with T = 4.
        temperature: positive; a number, or (*) with one per position (T^2 is then in the mean).

    Returns:
        Scalar, float32 at least; 0 where both distributions are equal.

    Raises:
        ConfigError: the logits are empty, not floating-point, of different shapes or of a single
            class, a temperature is not a finite number above 0, or the target has another shape
            or dtype or an index that is no class.

    Warns:
        UserWarning: there are two classes; then NCKD is 0.
    """
    check_logits(student, teacher)
    _check_target(target, student)
    if student.shape[-1] == 2:
        warnings.warn(
            "dkd_loss with two classes: only one class is not the target, so that NCKD is 0 and "
            "beta has no effect.",
            stacklevel=2,
        )
    student, teacher = promoted(student, teacher)
    temperature = checked_temperature(temperature, student)
    target = target.long().unsqueeze(-1)
    student_odds, log_student = _split(student / per_class(temperature), target)
    teacher_odds, log_teacher = _split(teacher / per_class(temperature), target)
    target_part = _binary_kl(teacher_odds, student_odds)
    other_part = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return batch_mean(alpha * target_part + beta * other_part, temperature)


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-odds of the target against all others (*), and the others' log-softmax."""
    others = torch.arange(logits.shape[-1] - 1, device=logits.device)
    without_target = logits.gather(-1, others + (others >= target))
    odds = logits.gather(-1, target).squeeze(-1) - without_target.logsumexp(-1)
    return odds, F.log_softmax(without_target, -1)


def _binary_kl(teacher_odds: Tensor, student_odds: Tensor) -> Tensor:
    """KL between two coins whose sides have the log-odds; log-sigmoids never become infinite."""
    divergence = torch.zeros_like(teacher_odds)
    for sign in (1, -1):
        log_teacher = F.logsigmoid(sign * teacher_odds)
        log_student = F.logsigmoid(sign * student_odds)
        divergence = divergence + log_teacher.exp() * (log_teacher - log_student)
    return divergence


def _check_target(target: Tensor, logits: Tensor) -> None:
    classes = logits.shape[-1]
    if classes < 2:
        raise ConfigError("dkd_loss needs two classes at least, got logits of 1.")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ConfigError(f"target is {target.dtype}; it must hold integer class indices.")
    if target.shape != logits.shape[:-1]:
        raise ConfigError(
            f"target has shape {tuple(target.shape)}; the logits {tuple(logits.shape)} need one "
            f"class index per position: {tuple(logits.shape[:-1])}."
        )
    lowest, highest = target.min().item(), target.max().item()
    if lowest < 0 or highest >= classes:
        raise ConfigError(
            f"target holds indices from {lowest} to {highest}; valid are 0 to {classes - 1}."
        )
