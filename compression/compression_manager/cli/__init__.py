"""The command `compression-manager`."""

from compression_manager.cli.main import main

__all__ = ["main"]
