"""Converted models: layers with integer weights, parity, and loading without training plugins."""

from compression_manager.deploy.conversion import Conversion
from compression_manager.deploy.layers import (
    ConvertedConv,
    ConvertedEmbedding,
    ConvertedLayer,
    ConvertedLinear,
    LayerSpec,
)
from compression_manager.deploy.parity import Parity, check_parity
from compression_manager.deploy.replacement import Replacement
from compression_manager.deploy.storage import load

__all__ = [
    "load",
    "Conversion",
    "Replacement",
    "Parity",
    "check_parity",
    "LayerSpec",
    "ConvertedLayer",
    "ConvertedLinear",
    "ConvertedConv",
    "ConvertedEmbedding",
]
