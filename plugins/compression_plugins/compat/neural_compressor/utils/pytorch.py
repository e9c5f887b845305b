"""Stands where Neural Compressor 2.6 has `load`."""

from compression_plugins.compat.neural_compressor.storage import load

__all__ = ["load"]
