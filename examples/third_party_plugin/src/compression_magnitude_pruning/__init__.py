"""Magnitude pruning for compression-manager."""

from compression_magnitude_pruning.config import MagnitudePruningConfig
from compression_magnitude_pruning.plugin import MagnitudePruningPlugin

__all__ = ["MagnitudePruningConfig", "MagnitudePruningPlugin"]
