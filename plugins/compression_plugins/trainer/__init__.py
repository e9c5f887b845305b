"""A ready training loop on the manager's hooks, for distillation with and without quantization."""

from compression_plugins.trainer.history import EpochRecord, TrainingHistory
from compression_plugins.trainer.trainer import KnowledgeDistillationTrainer

__all__ = ["EpochRecord", "KnowledgeDistillationTrainer", "TrainingHistory"]
