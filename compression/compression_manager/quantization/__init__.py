"""Schemes, arithmetic and the modules that quantize while a model trains."""

from compression_manager.quantization.arithmetic import dequantize, fake_quantize, quantize
from compression_manager.quantization.dynamic_quantizer import DynamicFakeQuantizer
from compression_manager.quantization.observer import Observer
from compression_manager.quantization.parameters import QuantizationParameters, choose_qparams
from compression_manager.quantization.quantizer_module import (
    FakeQuantizer,
    ObservedFakeQuantizer,
    Phase,
)
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite

__all__ = [
    "QuantizationScheme",
    "QuantizationParameters",
    "QuantizationSite",
    "choose_qparams",
    "quantize",
    "dequantize",
    "fake_quantize",
    "Observer",
    "FakeQuantizer",
    "ObservedFakeQuantizer",
    "DynamicFakeQuantizer",
    "Phase",
]
