"""The built-in plugins' configs and helpers; each plugin is imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compression_plugins.batch_norm import BatchNormReestimationConfig
    from compression_plugins.calibration import CalibrationConfig
    from compression_plugins.checkpoint import CheckpointConfig
    from compression_plugins.distillation import (
        AdaptiveSchedule,
        CosineSchedule,
        CurriculumSchedule,
        DistillationConfig,
        EnsembleTeacher,
        IntermediateLayersKnowledgeDistillationLossConfig,
        KnowledgeDistillationLossConfig,
        LinearSchedule,
        QuantizedTeacher,
        SelfKnowledgeDistillationLossConfig,
        TeacherRuntime,
        TokenDistillationLossConfig,
    )
    from compression_plugins.distillation.cache import IndexedDataset, TeacherCache
    from compression_plugins.early_stopping import EarlyStoppingConfig
    from compression_plugins.fake_quant import LayerRule, PTQConfig, QATConfig
    from compression_plugins.fake_quant import QATConfig as QuantizationAwareTrainingConfig
    from compression_plugins.learned_scale import LearnedScaleConfig
    from compression_plugins.progress import ProgressConfig
    from compression_plugins.tensorboard import TensorBoardConfig
    from compression_plugins.trainer import (
        EpochRecord,
        KnowledgeDistillationTrainer,
        TrainingHistory,
    )

__all__ = [
    "DistillationConfig",
    "KnowledgeDistillationLossConfig",
    "IntermediateLayersKnowledgeDistillationLossConfig",
    "SelfKnowledgeDistillationLossConfig",
    "TokenDistillationLossConfig",
    "LinearSchedule",
    "CosineSchedule",
    "CurriculumSchedule",
    "AdaptiveSchedule",
    "QuantizedTeacher",
    "EnsembleTeacher",
    "TeacherRuntime",
    "TeacherCache",
    "IndexedDataset",
    "QATConfig",
    "QuantizationAwareTrainingConfig",
    "PTQConfig",
    "LayerRule",
    "LearnedScaleConfig",
    "BatchNormReestimationConfig",
    "CalibrationConfig",
    "CheckpointConfig",
    "EarlyStoppingConfig",
    "TensorBoardConfig",
    "ProgressConfig",
    "KnowledgeDistillationTrainer",
    "TrainingHistory",
    "EpochRecord",
]

_HOMES = {
    "DistillationConfig": "distillation",
    "KnowledgeDistillationLossConfig": "distillation",
    "IntermediateLayersKnowledgeDistillationLossConfig": "distillation",
    "SelfKnowledgeDistillationLossConfig": "distillation",
    "TokenDistillationLossConfig": "distillation",
    "LinearSchedule": "distillation",
    "CosineSchedule": "distillation",
    "CurriculumSchedule": "distillation",
    "AdaptiveSchedule": "distillation",
    "QuantizedTeacher": "distillation",
    "EnsembleTeacher": "distillation",
    "TeacherRuntime": "distillation",
    "TeacherCache": "distillation.cache",
    "IndexedDataset": "distillation.cache",
    "QATConfig": "fake_quant",
    "PTQConfig": "fake_quant",
    "LayerRule": "fake_quant",
    "LearnedScaleConfig": "learned_scale",
    "BatchNormReestimationConfig": "batch_norm",
    "CalibrationConfig": "calibration",
    "CheckpointConfig": "checkpoint",
    "EarlyStoppingConfig": "early_stopping",
    "TensorBoardConfig": "tensorboard",
    "ProgressConfig": "progress",
    "KnowledgeDistillationTrainer": "trainer",
    "TrainingHistory": "trainer",
    "EpochRecord": "trainer",
}

# Neural Compressor's name.
_ALIASES = {"QuantizationAwareTrainingConfig": "QATConfig"}


def __getattr__(name: str) -> Any:
    target = _ALIASES.get(name, name)
    if target not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[target]}")
    return getattr(module, target)
