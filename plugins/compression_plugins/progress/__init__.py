"""Progress: a bar per epoch with the loss terms, or one line per epoch where there is no terminal.

It shows whatever is published under `loss/` and `eval/` and knows no publisher by name.
"""

from compression_plugins.progress.plugin import ProgressConfig, ProgressPlugin

__all__ = ["ProgressConfig", "ProgressPlugin"]
