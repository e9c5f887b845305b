"""Converted models: integer weights, parity, loading without training plugins, export, runtimes."""

from compression_manager.deploy.compiling import CompiledModel, compile
from compression_manager.deploy.conversion import Conversion
from compression_manager.deploy.exporting import Export, export
from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.convolution import ConvertedConv
from compression_manager.deploy.layers.embedding import ConvertedEmbedding
from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.deploy.layers.linear import ConvertedLinear
from compression_manager.deploy.measuring import Fastest, RouteResult, fastest
from compression_manager.deploy.opening import ExportedModel, load_exported
from compression_manager.deploy.parity import Parity, check_parity
from compression_manager.deploy.replacement import Replacement
from compression_manager.deploy.storage import load

__all__ = [
    "export",
    "Export",
    "load_exported",
    "ExportedModel",
    "compile",
    "CompiledModel",
    "fastest",
    "Fastest",
    "RouteResult",
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
