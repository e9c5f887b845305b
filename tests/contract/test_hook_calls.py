"""Pluggy carries events only: how many calls a training makes does not depend on the layers."""

from __future__ import annotations

import torch
from torch import nn

import toys
from compression_manager import prepare_compression
from compression_manager.testing import RecordingPlugin
from compression_plugins import DistillationConfig, QATConfig

SERVICES = {"make_observer", "make_fake_quantizer"}


def _calls(layers: int) -> tuple[int, list[str]]:
    """The number of questions at prepare, and every call after it."""
    recording = RecordingPlugin()
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)), nn.Linear(6, toys.CLASSES))
    manager = prepare_compression(model, [recording, DistillationConfig(toys.mlp()), QATConfig()])
    questions = sum(hook in SERVICES for hook in recording.hooks)
    recording.events.clear()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    manager.track(optimizer=optimizer)
    toys.train(manager, toys.loader(toys.vectors()), optimizer, 2)
    manager.convert()
    manager.close()
    return questions, recording.hooks


def test_training_calls_the_same_hooks_whatever_the_number_of_layers() -> None:
    few, many = _calls(1), _calls(6)
    assert many[0] > few[0]  # observers and quantizers are asked for layer by layer, once
    assert many[1] == few[1]
    assert not SERVICES & set(many[1])
