"""The page's callback, called in the order of transformers' Trainer, which needs accelerate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager import PluginConfig, prepare_compression
from compression_plugins import CheckpointConfig, EarlyStoppingConfig, QATConfig

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "use-another-librarys-loop.md"
EPOCHS, STEPS, ACCUMULATED = 4, 2, 2


@pytest.fixture(scope="module")
def callback_class() -> Any:
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block.group(1), names)
    return names["ManagerCallback"]


class Loop:
    """Stands for a Trainer: its events and its state, without checkpoints of its own."""

    def __init__(self, callback_class: Any, folder: Path, plugins: Sequence[PluginConfig]) -> None:
        from transformers import TrainerControl, TrainerState

        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3))
        self.manager = prepare_compression(self.model, plugins)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.manager.track(optimizer=self.optimizer)
        self.state, self.control = TrainerState(), TrainerControl()
        trainer = SimpleNamespace(manager=self.manager, evaluate=lambda: {"eval_accuracy": 0.5})
        self.callback = callback_class(trainer, folder)

    def fire(self, event: str) -> None:
        call = getattr(self.callback, event)
        call(None, self.state, self.control, model=self.model, lr_scheduler=self.scheduler)

    def train(self, *, begin: int = 0, end: int = EPOCHS) -> dict[str, Tensor]:
        """Return the model's state after the epochs up to `end`, where it stops as if killed."""
        self.state.global_step = begin * STEPS
        self.fire("on_train_begin")
        for epoch in range(begin, end):
            self.fire("on_epoch_begin")
            for step in range(STEPS):
                self._update(epoch * STEPS + step)
            self.fire("on_epoch_end")
            if self.control.should_training_stop:
                break
        if end == EPOCHS:
            self.fire("on_train_end")
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.manager.close()
        return state

    def _update(self, seed: int) -> None:
        batches = torch.randn(ACCUMULATED, 4, 8, generator=torch.Generator().manual_seed(seed))
        self.fire("on_step_begin")
        for batch in batches:
            output = self.model(batch)
            loss = self.manager.on_after_compute_loss(batch, output, output.square().mean())
            (loss / ACCUMULATED).backward()
        self.fire("on_pre_optimizer_step")
        self.optimizer.step()
        self.fire("on_optimizer_step")
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self.fire("on_step_end")


def test_resumed_at_the_end_of_an_epoch_it_ends_with_the_same_bits(
    callback_class: Any, tmp_path: Path
) -> None:
    def loop(name: str) -> Loop:
        folder = tmp_path / name
        return Loop(callback_class, folder, [QATConfig(), CheckpointConfig(folder)])

    expected = loop("whole").train()
    loop("parts").train(end=2)
    actual = loop("parts").train(begin=2)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_the_checkpoint_of_the_trainers_step_is_taken_and_not_the_newest(
    callback_class: Any, tmp_path: Path
) -> None:
    def loop() -> Loop:
        plugins = [QATConfig(), CheckpointConfig(tmp_path, keep_last=2)]
        return Loop(callback_class, tmp_path, plugins)

    loop().train(end=3)
    resumed = loop()
    with pytest.warns(UserWarning, match="newer than step 4"):
        resumed.train(begin=2)
    assert resumed.manager.position.global_step == EPOCHS * STEPS


def test_what_a_plugin_sees_in_an_evaluation_ends_the_training(
    callback_class: Any, tmp_path: Path
) -> None:
    early = EarlyStoppingConfig(metric="eval_accuracy", patience=1)
    loop = Loop(callback_class, tmp_path, [QATConfig(), early])
    loop.train()
    assert loop.manager.position.epoch == 2
