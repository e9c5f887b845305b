"""Intel Neural Compressor 2.6's training interface, on this framework's manager and plugins.

A script of that library runs after `neural_compressor` is replaced by
`compression_plugins.compat.neural_compressor` in its imports: `.config`, `.training` and
`.utils.pytorch` hold what they held there. What differs, field by field:
docs/how-to/migrate-from-neural-compressor.md.
"""

from compression_plugins.compat.neural_compressor.callbacks import CallBacks
from compression_plugins.compat.neural_compressor.config import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    QuantizationAwareTrainingConfig,
    SelfKnowledgeDistillationLossConfig,
    WeightPruningConfig,
)
from compression_plugins.compat.neural_compressor.model import CompressedModel
from compression_plugins.compat.neural_compressor.storage import load
from compression_plugins.compat.neural_compressor.training import (
    CompressionManager,
    prepare_compression,
)

__all__ = [
    "prepare_compression",
    "CompressionManager",
    "CallBacks",
    "CompressedModel",
    "load",
    "DistillationConfig",
    "KnowledgeDistillationLossConfig",
    "IntermediateLayersKnowledgeDistillationLossConfig",
    "SelfKnowledgeDistillationLossConfig",
    "QuantizationAwareTrainingConfig",
    "WeightPruningConfig",
]
