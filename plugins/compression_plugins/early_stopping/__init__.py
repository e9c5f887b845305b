"""Stop training when a metric no longer improves."""

from compression_plugins.early_stopping.config import EarlyStoppingConfig
from compression_plugins.early_stopping.plugin import EarlyStoppingPlugin

__all__ = ["EarlyStoppingConfig", "EarlyStoppingPlugin"]
