"""All plugins and all kinds of tracked objects, saved to disk at every step and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import toys
from compression_manager import CompressionManager, prepare_compression
from compression_manager.training.schedule import StartAt
from compression_plugins import (
    CheckpointConfig,
    DistillationConfig,
    EarlyStoppingConfig,
    ProgressConfig,
    QATConfig,
    TensorBoardConfig,
)

EPOCHS = 3
STEPS = 4


def _run(folder: Path, stop_after: int | None = None) -> tuple[CompressionManager, list[float]]:
    """Train, or continue, with checkpoints after every step; stop after `stop_after` steps."""
    torch.manual_seed(7)
    teacher = toys.ConvNet(8)
    model = toys.ConvNet(dropout=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=EPOCHS * STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    loader = toys.loader(toys.images())
    manager = prepare_compression(
        model,
        [
            DistillationConfig(teacher),
            QATConfig(freeze_observers_at=StartAt(step=5), freeze_batch_norm_at=StartAt(epoch=2)),
            CheckpointConfig(folder / "checkpoints", save_every_steps=1, metric="loss"),
            EarlyStoppingConfig(metric="loss", patience=2, lower_is_better=True),
            TensorBoardConfig(folder / "tensorboard"),
            ProgressConfig(),
        ],
    )
    manager.track(optimizer=optimizer, scheduler=scheduler, scaler=scaler, dataloader=loader)
    manager.resume(folder / "checkpoints", missing_ok=True)
    losses: list[float] = []
    for epoch in manager.epochs(EPOCHS):
        model.train()
        for _, (inputs, targets) in manager.steps(loader):
            output = model(inputs)
            loss = F.cross_entropy(output, targets)
            loss = manager.on_after_compute_loss(inputs, output, loss)
            scaler.scale(loss).backward()
            manager.on_before_optimizer_step()
            scaler.step(optimizer)
            scaler.update()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(float(loss.detach()))
            if manager.state_dict()["global_step"] == stop_after:
                return manager, losses
        manager.on_before_eval()
        # Falls twice and then stays, so that early stopping counts but does not stop yet.
        manager.on_after_eval({"loss": [3.0, 2.0, 2.0][epoch]})
    return manager, losses


def _comparable(manager: CompressionManager) -> dict[str, Any]:
    state = manager.state_dict()
    # From the objects themselves: a state that left one out would leave it out on both sides.
    tracked = manager._context.tracked
    state["own"] = {
        name: tracked[name].state_dict() for name in ("optimizer", "scheduler", "scaler")
    }
    manager.close()
    # The folders of the two runs differ, and nothing else may.
    del state["recipe"]
    return state


@pytest.mark.parametrize("stop_after", range(1, EPOCHS * STEPS))
def test_resumes_to_the_last_bit_from_every_step(tmp_path: Path, stop_after: int) -> None:
    whole, expected_losses = _run(tmp_path / "whole")
    stopped, first = _run(tmp_path / "parts", stop_after)
    stopped.close()
    continued, second = _run(tmp_path / "parts")
    assert [*first, *second] == expected_losses
    toys.assert_identical(_comparable(continued), _comparable(whole))
