"""TensorBoard: writes every published metric, and the recipe as hyperparameters.

It consumes whatever other plugins and the manager publish, and knows none of them by name.
"""

from compression_plugins.tensorboard.plugin import TensorBoardConfig, TensorBoardPlugin

__all__ = ["TensorBoardConfig", "TensorBoardPlugin"]
