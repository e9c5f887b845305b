"""Losses on intermediate features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from compression_manager.errors import ConfigError
from compression_plugins.distillation.losses.common import (
    check_same_features,
    check_same_samples,
    magnitude,
    promoted,
    unit,
)


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all elements of (student - teacher)^2.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3, as a mean instead
    of half a sum; the regressor that matches the widths is the caller's.

    Args:
        student: features of any shape.
        teacher: same shape; no gradient flows into it.

    Returns:
        Scalar, float32 at least.

    Raises:
        ConfigError: the features are empty, not floating-point or of different shapes.
    """
    check_same_features(student, teacher)
    return F.mse_loss(*promoted(student, teacher))


def l1_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all elements of |student - teacher|; its gradient is 0 where equal.

    Source: the option `L1` for intermediate layers of Intel Neural Compressor. Arguments, result
    and errors as for `hint_loss`.
    """
    check_same_features(student, teacher)
    return F.l1_loss(*promoted(student, teacher))


def attention_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over samples and places of (A_student - A_teacher)^2.

    A = Q / |Q|, where Q is the mean over channels of the squared features, flattened to one vector
    per sample, and |Q| its L2 norm. Source: Zagoruyko, Komodakis 2017, "Paying More Attention to
    Attention: Improving the Performance of Convolutional Neural Networks via Attention Transfer",
    equation 2; the mean over elements is the convention of the authors' code, where the paper
    takes the norm. A map that is zero everywhere stays zero and gets no gradient.

    Args:
        student: (N, C, *) float features with at least one dimension of places.
        teacher: (N, D, *) with the same N and places; no gradient flows into it.

    Returns:
        Scalar, float32 at least; it does not depend on the scale of either.

    Raises:
        ConfigError: the features are empty, not floating-point, have no places, or differ in
            samples or places.
    """
    check_same_samples(student, teacher)
    if min(student.ndim, teacher.ndim) < 3 or student.shape[2:] != teacher.shape[2:]:
        raise ConfigError(
            f"student features have shape {tuple(student.shape)}, teacher features "
            f"{tuple(teacher.shape)}; attention transfer needs (N, channels, *) with equal sizes "
            "after the channels."
        )
    student, teacher = promoted(student, teacher)
    return F.mse_loss(_attention(student), _attention(teacher))


def _attention(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    scaled = (rows / magnitude(rows)).view(features.shape)
    return unit(scaled.square().mean(1).flatten(1))
