"""Compress PyTorch models while they train, with plugins and your own training loop.

`prepare_compression(model, configs)` returns a `CompressionManager`; place its hooks in your
loop, then call `manager.convert()`.
"""

from compression_manager.context import Context
from compression_manager.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CompressionError,
    ConfigError,
    ForeignDirectoryError,
    LifecycleError,
    LossError,
    MissingObjectError,
    NotExportableError,
    ParityError,
    PluginError,
    QuantizationError,
    blame_option,
    suggest,
)
from compression_manager.loss import LossTerms
from compression_manager.manager import CompressionManager
from compression_manager.metrics import Metric
from compression_manager.plugin import Plugin, PluginConfig, hookimpl, option
from compression_manager.prepare import prepare_compression
from compression_manager.report import Report
from compression_manager.training.position import Position
from compression_manager.training.schedule import StartAt

__all__ = [
    "prepare_compression",
    "CompressionManager",
    "Position",
    "Report",
    "StartAt",
    "Plugin",
    "PluginConfig",
    "hookimpl",
    "option",
    "Context",
    "LossTerms",
    "Metric",
    "CompressionError",
    "ConfigError",
    "MissingObjectError",
    "PluginError",
    "LifecycleError",
    "LossError",
    "QuantizationError",
    "NotExportableError",
    "ParityError",
    "CheckpointError",
    "CheckpointCorruptError",
    "CheckpointMismatchError",
    "ForeignDirectoryError",
    "blame_option",
    "suggest",
]
