"""What every plugin has to do, with and without quantization beside it."""

from __future__ import annotations

from collections.abc import Sequence

from compression_magnitude_pruning import MagnitudePruningConfig

from compression_manager import PluginConfig, StartAt
from compression_manager.testing import PluginContract
from compression_plugins import QATConfig


class TestContract(PluginContract):
    def make_config(self) -> PluginConfig:
        return MagnitudePruningConfig(0.75, start=StartAt(step=1), end=StartAt(step=5))


class TestContractBesideQuantization(TestContract):
    def make_companions(self) -> Sequence[PluginConfig]:
        return [QATConfig()]
