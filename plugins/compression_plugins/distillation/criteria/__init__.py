"""Criteria: what of student and teacher is compared, and how."""

from compression_plugins.distillation.criteria.base import (
    Comparison,
    CriterionConfig,
    Surroundings,
)
from compression_plugins.distillation.criteria.layers import (
    IntermediateLayersKnowledgeDistillationLossConfig,
)
from compression_plugins.distillation.criteria.logits import KnowledgeDistillationLossConfig
from compression_plugins.distillation.criteria.self_distillation import (
    SelfKnowledgeDistillationLossConfig,
)
from compression_plugins.distillation.criteria.tokens import TokenDistillationLossConfig

__all__ = [
    "CRITERIA",
    "Comparison",
    "CriterionConfig",
    "IntermediateLayersKnowledgeDistillationLossConfig",
    "KnowledgeDistillationLossConfig",
    "SelfKnowledgeDistillationLossConfig",
    "Surroundings",
    "TokenDistillationLossConfig",
]

CRITERIA: dict[str, type[CriterionConfig]] = {
    "knowledge_distillation": KnowledgeDistillationLossConfig,
    "intermediate_layers": IntermediateLayersKnowledgeDistillationLossConfig,
    "self_distillation": SelfKnowledgeDistillationLossConfig,
    "tokens": TokenDistillationLossConfig,
}
