"""Learned scales (LSQ) and zero points (LSQ+) for quantization-aware training with few bits."""

from compression_plugins.learned_scale.config import LearnedScaleConfig
from compression_plugins.learned_scale.plugin import LearnedScalePlugin
from compression_plugins.learned_scale.quantizer import LearnedScaleQuantizer

__all__ = ["LearnedScaleConfig", "LearnedScalePlugin", "LearnedScaleQuantizer"]
