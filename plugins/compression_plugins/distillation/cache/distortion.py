"""What the stored form of a teacher's outputs changes in distillation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compression_manager.errors import ConfigError
from compression_plugins.distillation.losses import kd_loss
from compression_plugins.distillation.teachers.distortion import measure_distortion


@dataclass(frozen=True)
class CacheDistortion:
    """Cached against live outputs for one batch; all zero (agreement 1) if they are equal.

    Attributes:
        temperature: of the loss.
        loss_absolute_error: mean over the batch of |kd_loss(student, cached) -
            kd_loss(student, live)|, each loss of one sample, in float64.
        loss_relative_error: the same, divided by the mean of kd_loss(student, live).
        kl: mean of KL(softmax(live) || softmax(cached)), in nats, at temperature 1.
        top1_agreement: fraction of the predictions with the same most likely class, 0 to 1.
    """

    temperature: float
    loss_absolute_error: float
    loss_relative_error: float
    kl: float
    top1_agreement: float


def compare(student: Tensor, live: Tensor, cached: Tensor, temperature: float) -> CacheDistortion:
    """Compare two teachers' logits for the same student; all (batch, *, classes).

    Raises:
        ConfigError: the shapes differ, the batch is empty, or the temperature is not positive.
    """
    if not student.shape == live.shape == cached.shape or live.numel() == 0:
        raise ConfigError(
            "the distortion of a cache needs logits of one shape for at least one sample; the "
            f"student's have {tuple(student.shape)}, the live teacher's {tuple(live.shape)}, the "
            f"cached {tuple(cached.shape)}."
        )
    # The processor's memory, because some accelerators have no float64.
    student, live, cached = (item.detach().cpu().double() for item in (student, live, cached))
    errors, losses = [], []
    for own, exact, stored in zip(student, live, cached, strict=True):
        loss = kd_loss(own, exact, temperature)
        errors.append((kd_loss(own, stored, temperature) - loss).abs().item())
        losses.append(loss.item())
    general = measure_distortion(live, cached)
    error, total = sum(errors), sum(losses)
    return CacheDistortion(
        temperature=temperature,
        loss_absolute_error=error / len(errors),
        loss_relative_error=error / total if total > 0 else (0.0 if error == 0 else float("inf")),
        kl=general.kl,
        top1_agreement=general.top1_agreement,
    )
