"""Knowledge distillation from a teacher's outputs."""

from compression_plugins.distillation.config import (
    DistillationConfig,
    KnowledgeDistillationLossConfig,
)
from compression_plugins.distillation.distortion import TeacherDistortion
from compression_plugins.distillation.plugin import DistillationPlugin
from compression_plugins.distillation.quantized_teacher import QuantizedTeacher

__all__ = [
    "DistillationConfig",
    "DistillationPlugin",
    "KnowledgeDistillationLossConfig",
    "QuantizedTeacher",
    "TeacherDistortion",
]
