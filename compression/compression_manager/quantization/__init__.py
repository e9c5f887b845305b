"""Schemes, arithmetic and the modules that quantize while a model trains."""

from compression_manager.quantization.arithmetic.parameters import (
    QuantizationParameters,
    choose_qparams,
)
from compression_manager.quantization.arithmetic.rounding import dequantize, fake_quantize, quantize
from compression_manager.quantization.calibration import (
    Calibration,
    FixedRangeCalibration,
    HistogramCalibration,
    MinMaxCalibration,
    MovingAverageCalibration,
    PercentileCalibration,
)
from compression_manager.quantization.graph import FakeQuantizeOp, QuantizationGraph
from compression_manager.quantization.layers.functional import (
    QuantizableAdd,
    QuantizableAttention,
    QuantizableMatmul,
)
from compression_manager.quantization.observer import Observer
from compression_manager.quantization.observers import (
    FixedRangeObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    RangeObserver,
)
from compression_manager.quantization.quantizers.dynamic_quantizer import DynamicFakeQuantizer
from compression_manager.quantization.quantizers.phase import Phase
from compression_manager.quantization.quantizers.quantizer_module import (
    FakeQuantizer,
    ObservedFakeQuantizer,
)
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite
from compression_manager.quantization.storage import Quantizer, StorageReport

__all__ = [
    "QuantizationScheme",
    "QuantizationParameters",
    "QuantizationSite",
    "choose_qparams",
    "quantize",
    "dequantize",
    "fake_quantize",
    "Observer",
    "RangeObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "PercentileObserver",
    "HistogramObserver",
    "FixedRangeObserver",
    "Calibration",
    "MinMaxCalibration",
    "MovingAverageCalibration",
    "PercentileCalibration",
    "HistogramCalibration",
    "FixedRangeCalibration",
    "Quantizer",
    "StorageReport",
    "FakeQuantizer",
    "ObservedFakeQuantizer",
    "DynamicFakeQuantizer",
    "Phase",
    "QuantizableMatmul",
    "QuantizableAdd",
    "QuantizableAttention",
    "FakeQuantizeOp",
    "QuantizationGraph",
]
