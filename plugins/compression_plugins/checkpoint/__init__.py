"""Save the training state every so often, and keep the newest and the best."""

from compression_plugins.checkpoint.config import CheckpointConfig
from compression_plugins.checkpoint.plugin import CheckpointPlugin, best_checkpoint

__all__ = ["CheckpointConfig", "CheckpointPlugin", "best_checkpoint"]
