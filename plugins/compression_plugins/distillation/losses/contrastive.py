"""Contrastive distillation: each student embedding finds its teacher embedding in the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_plugins.distillation.losses.common import (
    check_one_temperature,
    check_same_features,
    check_same_samples,
    matmul,
    promoted,
    unit,
)


def contrastive_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean over i of -log(exp(c[i, i] / T) / sum_j exp(c[i, j] / T)).

    c[i, j] is the cosine between student embedding i and teacher embedding j: the positive is the
    teacher's embedding of the same sample, the negatives are its embeddings of the others. Source:
    InfoNCE of van den Oord, Li, Vinyals 2018, "Representation Learning with Contrastive Predictive
    Coding", equation 4, with the scaled cosine of NT-Xent of Chen, Kornblith, Norouzi, Hinton 2020,
    "A Simple Framework for Contrastive Learning of Visual Representations", equation 1. NT-Xent
    also takes the negatives of the anchor's own view and both directions; here the student's
    embeddings are the only anchors. There is no factor T^2.

    Args:
        student: (N, *) float embeddings; all but the first dimension are flattened.
        teacher: same shape; no gradient flows into it.
        temperature: positive number; NT-Xent is used with about 0.1.

    Returns:
        Scalar, float32 at least; log(N) where nothing is told apart. An embedding of zeros has the
        cosine 0 with all and gets no gradient.

    Raises:
        ConfigError: the embeddings are empty, not floating-point or of different shapes, or the
            temperature is not a finite number above 0.
    """
    check_same_samples(student, teacher)
    check_same_features(student, teacher)
    check_one_temperature(temperature)
    student, teacher = (unit(item.flatten(1)) for item in promoted(student, teacher))
    similarities = matmul(student, teacher.T) / temperature
    return F.cross_entropy(similarities, torch.arange(len(student), device=student.device))
