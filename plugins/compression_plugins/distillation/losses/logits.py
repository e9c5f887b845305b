"""Losses on logits: distillation as Hinton's, its variants, and DIST."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_plugins.distillation.losses.common import (
    Temperature,
    batch_mean,
    check_label_smoothing,
    check_logits,
    check_one_temperature,
    checked_temperature,
    promoted,
    unit,
)
from compression_plugins.distillation.losses.distributions import ForwardKL, log_probabilities


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: Temperature = 1.0,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return T^2 * mean KL(p || softmax(student / T)).

    p = (1 - e) softmax(teacher / T) + e / classes, with the label smoothing e. Source: Hinton,
    Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2, up to the
    teacher's entropy, which has no gradient. Smoothing: Szegedy et al. 2016, "Rethinking the
    Inception Architecture for Computer Vision", section 7, with p for the labels.

    Args:
        student: (*, classes) float logits.
        teacher: same shape; no gradient flows into it.
        temperature: positive; a number, or (*) with one per position (T^2 is then in the mean).
        label_smoothing: from 0 to 1.

    Returns:
        Scalar, float32 at least; 0 where both distributions are equal.

    Raises:
        ConfigError: the logits are empty, not floating-point or of different shapes, a
            temperature is not a finite number above 0, or the smoothing is not from 0 to 1.
    """
    check_label_smoothing(label_smoothing)
    log_student, log_teacher, temperature = log_probabilities(student, teacher, temperature)
    divergence = ForwardKL(student.shape[-1], label_smoothing)
    return batch_mean(divergence.value(log_student, log_teacher), temperature)


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    temperature: Temperature = 1.0,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return T^2 * mean cross-entropy of softmax(student / T) against p as in `kd_loss`.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2, whose
    gradient is equation 2. Equals `kd_loss` plus T^2 times the mean entropy of p. Arguments and
    errors as for `kd_loss`.
    """
    check_label_smoothing(label_smoothing)
    log_student, log_teacher, temperature = log_probabilities(student, teacher, temperature)
    target, _ = ForwardKL(student.shape[-1], label_smoothing).target(log_teacher)
    return batch_mean(-(target * log_student).sum(-1), temperature)


def mse_loss(student: Tensor, teacher: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Return T^2 * mean over all elements of (student / T - teacher / T)^2.

    The factors cancel: the temperature has no effect. Source: Ba, Caruana 2014, "Do Deep Nets
    Really Need to be Deep?", the regression on logits, as a mean. Arguments and errors as for
    `kd_loss`.
    """
    check_logits(student, teacher)
    checked_temperature(temperature, student)
    return F.mse_loss(*promoted(student, teacher))


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return T^2 * (beta * inter + gamma * intra): distances of correlation.

    With the probabilities Y = softmax(logits / T) of N positions as (N, classes),
    inter = 1 - mean over positions of pearson(Y_student[i, :], Y_teacher[i, :]) and
    intra = 1 - mean over classes of pearson(Y_student[:, j], Y_teacher[:, j]). Source: Huang, You,
    Wang, Qian, Xu 2022, "Knowledge Distillation from A Stronger Teacher", section 3. The factor
    T^2 and the weights of 1 are those of the authors' code.

    A row or column that is constant up to rounding, as every column of a single position, has
    correlation 0 and no gradient; the authors add 1e-8 to the norms to the same end.

    Args:
        student: (*, classes) float logits; all other dimensions together are the N positions.
        teacher: same shape; no gradient flows into it.
        beta: weight of the relation between classes.
        gamma: weight of the relation within each class; it compares samples with one another.
        temperature: positive number.

    Returns:
        Scalar, float32 at least; 0 where both distributions are equal and none is constant.

    Raises:
        ConfigError: as for `kd_loss`.
    """
    check_one_temperature(temperature)
    log_student, log_teacher, _ = log_probabilities(student, teacher, temperature)
    of_student, of_teacher = (item.exp().flatten(0, -2) for item in (log_student, log_teacher))
    inter = 1 - _pearson(of_student, of_teacher).mean()
    intra = 1 - _pearson(of_student.T, of_teacher.T).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _pearson(left: Tensor, right: Tensor) -> Tensor:
    return (unit(_centered(left)) * unit(_centered(right))).sum(-1)


def _centered(rows: Tensor) -> Tensor:
    """Subtract the mean of each row; what is left of a constant row is rounding, so set it to 0."""
    centered = rows - rows.mean(-1, keepdim=True)
    rounding = 16 * torch.finfo(rows.dtype).eps * rows.detach().abs().amax(-1, keepdim=True)
    is_constant = centered.detach().abs().amax(-1, keepdim=True) <= rounding
    return centered.masked_fill(is_constant, 0)
