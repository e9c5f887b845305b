"""A short run with default options already shows ranges and histograms in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import toys
from compression_manager import prepare_compression
from compression_plugins import QATConfig, TensorBoardConfig


def test_details_after_the_second_update(tmp_path: Path) -> None:
    model = toys.ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with prepare_compression(model, [QATConfig(), TensorBoardConfig(tmp_path)]) as manager:
        manager.track(optimizer=optimizer)
        toys.train(manager, toys.loader(toys.images()), optimizer, epochs=1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scales = events.Scalars("quantization/conv1/input/scale")
    assert [event.step for event in scales] == [2]
    assert scales[0].value > 0
    assert "quantization/conv1/weight" in events.Tags()["histograms"]
