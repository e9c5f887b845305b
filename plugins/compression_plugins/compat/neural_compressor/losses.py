"""The loss of Neural Compressor 2.6 that no other plugin offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compression_manager import Plugin, PluginConfig, hookimpl


@dataclass(frozen=True)
class LossesConfig(PluginConfig):
    """Offer 'L2'."""

    plugin: ClassVar[str] = "neural_compressor_losses"


class LossesPlugin(Plugin[LossesConfig]):
    """Answers the service for 'L2'; made beside the distillers that name it."""

    config_class = LossesConfig

    @hookimpl
    def make_distillation_loss(
        self, name: str, options: Mapping[str, Any]
    ) -> Callable[..., Tensor] | None:
        """Return the loss, or None for any other name."""
        return euclidean_distance if name == "L2" else None


def euclidean_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the L2 norm of (student - teacher), the whole batch as one vector.

    Source: the option `L2` of self-distillation in Intel Neural Compressor 2.6. It grows with the
    square root of the batch size.

    Args:
        student: features of any shape.
        teacher: same shape; no gradient flows into it.

    Returns:
        Scalar; its gradient is 0 where both are equal.
    """
    distance: Tensor = torch.linalg.vector_norm(student.float() - teacher.detach().float())
    return distance
