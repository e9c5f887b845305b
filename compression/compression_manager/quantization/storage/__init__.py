"""Weights of trained models as integers: `Quantizer`, and how they lie in memory and in files."""

from compression_manager.quantization.storage.module import IntegerWeights
from compression_manager.quantization.storage.packing import pack_bits, unpack_bits
from compression_manager.quantization.storage.quantizer import Quantizer
from compression_manager.quantization.storage.report import StorageReport, WeightReport
from compression_manager.quantization.storage.weight import WeightFormat

__all__ = [
    "Quantizer",
    "StorageReport",
    "WeightReport",
    "WeightFormat",
    "IntegerWeights",
    "pack_bits",
    "unpack_bits",
]
