"""Losses on how the samples of a batch relate to one another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_plugins.distillation.losses.common import (
    check_same_samples,
    magnitude,
    matmul,
    promoted,
    unit,
)


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean smooth L1 between both N x N matrices of relative distances.

    d[i, j] = |x_i - x_j| / mean of the distances above 0; smooth L1 is x^2 / 2 below 1 and
    |x| - 1/2 above. Source: Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation",
    distance-wise loss in section 3. The mean over all N^2 entries, with the zeros of the diagonal,
    is the convention of the authors' code; the paper sums over pairs. Equal samples have distance
    0 here (1e-6 there), and no gradient with respect to it.

    Args:
        student: (N, *) float embeddings; all but the first dimension are flattened.
        teacher: (N, *) with the same N, any other sizes; no gradient flows into it.

    Returns:
        Scalar, float32 at least. It does not change when either side is rotated, moved or scaled.

    Raises:
        ConfigError: the embeddings are empty, not floating-point, or differ in N.
    """
    student, teacher = _rows(student, teacher)
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean smooth L1 between both N x N x N arrays of cosines.

    c[i, j, k] is the cosine of the angle at sample i between the directions to j and k, 0 where
    one of them is i itself or equal to it. Source: Park, Kim, Lu, Cho 2019, "Relational Knowledge
    Distillation", angle-wise loss in section 3. The mean over all N^3 entries, with those zeros,
    is the convention of the authors' code; the paper sums over triplets. Memory: N^2 times the
    size of an embedding, and N^3.

    Arguments, invariances and errors as for `rkd_distance_loss`.
    """
    student, teacher = _rows(student, teacher)
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum of squares of G_student - G_teacher over N^2.

    G = the N x N matrix of scalar products of the flattened features, each row divided by its L2
    norm. Source: Tung, Mori 2019, "Similarity-Preserving Knowledge Distillation", equations 2 to 4.
    A sample of zeros has a row of zeros and gets no gradient by it.

    Args:
        student: (N, *) float features; all but the first dimension are flattened.
        teacher: (N, *) with the same N, any other sizes; no gradient flows into it.

    Returns:
        Scalar, float32 at least. It does not change when either side is rotated or scaled.

    Raises:
        ConfigError: the features are empty, not floating-point, or differ in N.
    """
    student, teacher = _rows(student, teacher)
    return F.mse_loss(_similarities(student), _similarities(teacher))


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as (N, features), scaled to less than 2: none of the losses sees the scale."""
    check_same_samples(student, teacher)
    student, teacher = (item.flatten(1) for item in promoted(student, teacher))
    return student / magnitude(student.flatten()), teacher / magnitude(teacher.flatten())


def _relative_distances(rows: Tensor) -> Tensor:
    # The mode with a matrix product is wrong for close samples. The gradient is 0 at distance 0.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    positive = (distances > 0).sum()
    mean = distances.sum() / positive.clamp(min=1)
    return distances / mean.masked_fill(positive == 0, 1)


def _cosines(rows: Tensor) -> Tensor:
    directions = unit(rows.unsqueeze(0) - rows.unsqueeze(1))
    return matmul(directions, directions.transpose(1, 2))


def _similarities(rows: Tensor) -> Tensor:
    return unit(matmul(rows, rows.T))
