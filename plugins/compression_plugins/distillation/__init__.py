"""Knowledge distillation from a teacher's outputs or layers, or from the student itself."""

from compression_plugins.distillation.config import DistillationConfig
from compression_plugins.distillation.criteria import (
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    SelfKnowledgeDistillationLossConfig,
    TokenDistillationLossConfig,
)
from compression_plugins.distillation.criteria.schedules import (
    AdaptiveSchedule,
    CosineSchedule,
    CurriculumSchedule,
    LinearSchedule,
    Schedule,
)
from compression_plugins.distillation.plugin import DistillationPlugin
from compression_plugins.distillation.teachers.distortion import TeacherDistortion
from compression_plugins.distillation.teachers.ensemble import EnsembleTeacher
from compression_plugins.distillation.teachers.quantized import QuantizedTeacher
from compression_plugins.distillation.teachers.runtime import TeacherRuntime

__all__ = [
    "AdaptiveSchedule",
    "CosineSchedule",
    "CurriculumSchedule",
    "DistillationConfig",
    "DistillationPlugin",
    "IntermediateLayersKnowledgeDistillationLossConfig",
    "EnsembleTeacher",
    "KnowledgeDistillationLossConfig",
    "LinearSchedule",
    "QuantizedTeacher",
    "Schedule",
    "SelfKnowledgeDistillationLossConfig",
    "TeacherDistortion",
    "TokenDistillationLossConfig",
    "TeacherRuntime",
]
