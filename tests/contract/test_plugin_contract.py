"""Every built-in plugin passes the contract that third parties are given."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from compression_manager import PluginConfig
from compression_manager.testing import PluginContract, images, loader, tiny_convolution_network
from compression_plugins import (
    BatchNormReestimationConfig,
    CalibrationConfig,
    CheckpointConfig,
    DistillationConfig,
    EarlyStoppingConfig,
    LearnedScaleConfig,
    ProgressConfig,
    PTQConfig,
    QATConfig,
    TensorBoardConfig,
)


class TestBatchNormReestimation(PluginContract):
    def make_config(self) -> PluginConfig:
        return BatchNormReestimationConfig()


class TestCalibration(PluginContract):
    def make_config(self) -> PluginConfig:
        return CalibrationConfig(observer="min_max")

    def make_companions(self) -> Sequence[PluginConfig]:
        return [QATConfig()]


@pytest.mark.filterwarnings("ignore:a state is saved after")  # the kit's loops are plain ones
class TestCheckpoint(PluginContract):
    def make_config(self) -> PluginConfig:
        return CheckpointConfig(
            self.folder / "checkpoints", save_every_steps=2, metric="loss", lower_is_better=True
        )


class TestDistillation(PluginContract):
    def make_config(self) -> PluginConfig:
        return DistillationConfig(tiny_convolution_network(width=8))


class TestEarlyStopping(PluginContract):
    def make_config(self) -> PluginConfig:
        return EarlyStoppingConfig(metric="loss", patience=1)


class TestLearnedScale(PluginContract):
    def make_config(self) -> PluginConfig:
        return LearnedScaleConfig()

    def make_companions(self) -> Sequence[PluginConfig]:
        return [QATConfig()]


class TestProgress(PluginContract):
    def make_config(self) -> PluginConfig:
        return ProgressConfig()


class TestPTQ(PluginContract):
    def make_config(self) -> PluginConfig:
        return PTQConfig(calibration_data=loader(images(8)), bias_correction=True)


class TestQAT(PluginContract):
    def make_config(self) -> PluginConfig:
        return QATConfig()


class TestTensorBoard(PluginContract):
    def make_config(self) -> PluginConfig:
        return TensorBoardConfig(self.folder / "tensorboard")
