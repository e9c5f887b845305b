"""Losses on logits that also pull the student away from what the teacher finds unlikely."""

from __future__ import annotations

from torch import Tensor

from compression_manager.errors import ConfigError
from compression_plugins.distillation.losses.common import Temperature, batch_mean
from compression_plugins.distillation.losses.distributions import (
    JensenShannon,
    ReverseKL,
    log_probabilities,
)


def reverse_kl_loss(student: Tensor, teacher: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Return T^2 * mean KL(softmax(student / T) || softmax(teacher / T)).

    Source: Gu, Dong, Wei, Huang 2024, "MiniLLM: Knowledge Distillation of Large Language Models",
    equation 1, here per position and over all classes instead of over sampled sequences. The
    factor T^2 is Hinton's (see `kd_loss`).

    Args:
        student: (*, classes) float logits.
        teacher: same shape; no gradient flows into it.
        temperature: positive; a number, or (*) with one per position (T^2 is then in the mean).

    Returns:
        Scalar, float32 at least; 0 where both distributions are equal.

    Raises:
        ConfigError: the logits are empty, not floating-point or of different shapes, or a
            temperature is not a finite number above 0.
    """
    log_student, log_teacher, temperature = log_probabilities(student, teacher, temperature)
    return batch_mean(ReverseKL().value(log_student, log_teacher), temperature)


def jensen_shannon_loss(
    student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: Temperature = 1.0
) -> Tensor:
    """Return T^2 * mean of beta KL(P || M) + (1 - beta) KL(Q || M), with M = beta P + (1 - beta) Q.

    P = softmax(teacher / T) and Q = softmax(student / T). Source: the generalised Jensen-Shannon
    divergence of Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from
    Self-Generated Mistakes", section 2. Divided by beta it tends to KL(P || Q) for beta -> 0, and
    divided by 1 - beta to KL(Q || P) for beta -> 1. Some implementations switch to those at 0 and
    1 exactly; the formula is 0 there, so both are refused here. The factor T^2 is Hinton's.

    Args:
        student: (*, classes) float logits.
        teacher: same shape; no gradient flows into it.
        beta: the teacher's share, between 0 and 1.
        temperature: positive; a number, or (*) with one per position (T^2 is then in the mean).

    Returns:
        Scalar, float32 at least; 0 where both distributions are equal.

    Raises:
        ConfigError: as for `reverse_kl_loss`, or beta is not between 0 and 1.
    """
    check_beta(beta)
    log_student, log_teacher, temperature = log_probabilities(student, teacher, temperature)
    return batch_mean(JensenShannon(beta).value(log_student, log_teacher), temperature)


def check_beta(beta: float) -> None:
    """Refuse a share that is not strictly between 0 and 1."""
    if not 0 < beta < 1:
        raise ConfigError(
            f"beta must be above 0 and below 1, got {beta}; the divergence is 0 at both ends. "
            "Use forward KL in place of 0 and reverse KL in place of 1."
        )
