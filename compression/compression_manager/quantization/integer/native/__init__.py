"""The passes as C++ kernels, built once where there is a compiler."""

from compression_manager.quantization.integer.native.loader import Library, load_library
from compression_manager.quantization.integer.native.passes import NativePasses

__all__ = ["Library", "NativePasses", "load_library"]
