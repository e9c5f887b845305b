"""BatchNorm statistics estimated anew after training, from the quantized model's own outputs."""

from compression_plugins.batch_norm.plugin import (
    BatchNormReestimationConfig,
    BatchNormReestimationPlugin,
)

__all__ = ["BatchNormReestimationConfig", "BatchNormReestimationPlugin"]
