"""Knowledge distillation from a teacher's outputs."""

from compression_plugins.distillation.config import (
    DistillationConfig,
    KnowledgeDistillationLossConfig,
)
from compression_plugins.distillation.distortion import TeacherDistortion
from compression_plugins.distillation.ensemble import EnsembleTeacher
from compression_plugins.distillation.plugin import DistillationPlugin
from compression_plugins.distillation.quantized_teacher import QuantizedTeacher
from compression_plugins.distillation.teacher_runtime import TeacherRuntime

__all__ = [
    "DistillationConfig",
    "DistillationPlugin",
    "EnsembleTeacher",
    "KnowledgeDistillationLossConfig",
    "QuantizedTeacher",
    "TeacherDistortion",
    "TeacherRuntime",
]
