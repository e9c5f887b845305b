"""How far a quantized teacher's predictions are from the float ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compression_manager.errors import ConfigError
from compression_plugins.distillation.losses import kd_loss


@dataclass(frozen=True)
class TeacherDistortion:
    """What quantization changed in a teacher's predictions for one batch.

    Attributes:
        kl: mean over the batch of KL(softmax(float teacher) || softmax(quantized teacher)), in
            nats, computed in float64.
        top1_agreement: fraction of the predictions with the same most likely class, 0 to 1; of
            equal logits the first counts.
    """

    kl: float
    top1_agreement: float


def measure_distortion(exact: Tensor, quantized: Tensor) -> TeacherDistortion:
    """Compare two logits of shape (*, classes).

    Raises:
        ConfigError: the shapes differ, or there is no prediction to compare.
    """
    if exact.shape != quantized.shape or exact.numel() == 0:
        raise ConfigError(
            "the distortion needs logits of one shape for at least one example; the float "
            f"teacher's have shape {tuple(exact.shape)}, the quantized teacher's "
            f"{tuple(quantized.shape)}."
        )
    # The processor's memory, because some accelerators have no float64.
    exact, quantized = exact.detach().cpu().double(), quantized.detach().cpu().double()
    same = (exact.argmax(-1) == quantized.argmax(-1)).double()
    return TeacherDistortion(kd_loss(quantized, exact).item(), same.mean().item())
