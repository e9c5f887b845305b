"""The operations that a model runs, as a list of lines, checked, and as a picture."""

from compression_manager.quantization.graph.fake_quantize_op import FakeQuantizeOp
from compression_manager.quantization.graph.operations import Operation, TensorOp
from compression_manager.quantization.graph.quantization_graph import QuantizationGraph

__all__ = ["QuantizationGraph", "FakeQuantizeOp", "TensorOp", "Operation"]
