"""What every plugin has to do."""

from __future__ import annotations

from compression_magnitude_pruning import MagnitudePruningConfig

from compression_manager import PluginConfig, StartAt
from compression_manager.testing import PluginContract


class TestContract(PluginContract):
    def make_config(self) -> PluginConfig:
        return MagnitudePruningConfig(0.75, start=StartAt(step=1), end=StartAt(step=5))
