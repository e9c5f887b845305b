"""Knowledge distillation from a teacher's outputs."""

from compression_plugins.distillation.config import (
    DistillationConfig,
    KnowledgeDistillationLossConfig,
)
from compression_plugins.distillation.plugin import DistillationPlugin

__all__ = ["DistillationConfig", "DistillationPlugin", "KnowledgeDistillationLossConfig"]
