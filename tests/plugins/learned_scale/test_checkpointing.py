"""Activation checkpointing repeats a forward pass, which observes nothing anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compression_manager import prepare_compression
from compression_plugins import LearnedScaleConfig, QATConfig
from quantization_reference import step


class Checkpointed(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(super().forward, input, use_reentrant=False)


def _state_after_observing(kind: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = kind(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    manager = prepare_compression(model, [QATConfig(), LearnedScaleConfig()])
    manager.track(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    step(manager, torch.randn(5, 6).requires_grad_())
    return model.state_dict()


def test_a_checkpointed_model_observes_each_batch_once() -> None:
    expected = _state_after_observing(nn.Sequential)
    found = _state_after_observing(Checkpointed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
