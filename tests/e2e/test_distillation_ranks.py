"""Layer-wise distillation under DistributedDataParallel on two ranks: one set of projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import toys
from compression_manager import prepare_compression
from compression_plugins import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
)
from rank_runs import on_ranks

STEPS = 4


def train(rank: int | None, *, early: bool, synchronize: bool = True) -> dict[str, Tensor]:
    """Train on a rank's half of each batch; None: on both halves in one process."""
    torch.manual_seed(0)
    teacher = toys.mlp(12)
    model = toys.mlp()
    inputs, targets = toys.vectors(16 * STEPS).tensors
    criterion = IntermediateLayersKnowledgeDistillationLossConfig(["0"], loss_weights=3.0)
    config = DistillationConfig(teacher, criterion, synchronize=synchronize)
    torch.manual_seed(rank or 0)  # of the projection's weights
    manager = prepare_compression(model, [config], example_inputs=inputs[:2] if early else None)
    called: Any = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager.track(optimizer=optimizer)
    part = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
    for _ in manager.epochs(1):
        for step, _ in manager.steps(range(STEPS)):
            batch = slice(16 * step, 16 * step + 16)
            images, labels = inputs[batch][part], targets[batch][part]
            output = called(images)
            loss = F.cross_entropy(output, labels)
            manager.on_after_compute_loss(images, output, loss).backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            optimizer.zero_grad()
    projection = manager.state_dict()["plugins"]["distillation"]["criterion"]["MSE/0"]
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        **{name: value.clone() for name, value in projection["parameters"].items()},
    }


def early(rank: int) -> Any:
    return train(rank, early=True)


def late(rank: int) -> Any:
    return train(rank, early=False)


def apart(rank: int) -> Any:
    return train(rank, early=True, synchronize=False)


@pytest.mark.slow
@pytest.mark.parametrize("function", [early, late])
def test_projections_are_equal_and_those_of_one_process(function: Any, tmp_path: Path) -> None:
    first, second = on_ranks(function, tmp_path)
    toys.assert_identical(first, second)
    alone = train(None, early=function is early)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_ranks_may_train_projections_of_their_own(tmp_path: Path) -> None:
    first, second = on_ranks(apart, tmp_path)
    assert not torch.equal(first["map.weight"], second["map.weight"])
