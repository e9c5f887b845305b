"""Quantization-aware training: fake quantization inserted by changing layers' classes in place."""

from compression_plugins.fake_quant.config import LayerRule, QATConfig
from compression_plugins.fake_quant.plugin import QATPlugin

__all__ = ["LayerRule", "QATConfig", "QATPlugin"]
