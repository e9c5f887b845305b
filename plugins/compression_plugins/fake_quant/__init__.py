"""Quantization-aware training and post-training quantization.

Fake quantization is inserted by changing layers' classes in place.
"""

from compression_plugins.fake_quant.config import LayerRule, QATConfig
from compression_plugins.fake_quant.plugin import QATPlugin
from compression_plugins.fake_quant.post_training import PTQPlugin
from compression_plugins.fake_quant.post_training_config import PTQConfig

__all__ = ["LayerRule", "QATConfig", "QATPlugin", "PTQConfig", "PTQPlugin"]
