"""Every order of the plugins trains, resumes and converts, with the same result."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import toys
from compression_manager import CompressionManager, Position, prepare_compression
from compression_manager.deploy import load
from compression_plugins import (
    CheckpointConfig,
    DistillationConfig,
    QATConfig,
    TensorBoardConfig,
)
from toy_teachers import criterion

NAMES = ("distillation", "qat", "checkpoint", "tensorboard")
ORDERS = list(itertools.permutations(NAMES))
EPOCHS = 2
STEPS_PER_EPOCH = 3
MIDDLE = 2  # in mid-epoch, after fake quantization has started
INPUTS = toys.images(16, seed=7).tensors[0]


class Run(NamedTuple):
    manager: CompressionManager
    losses: list[float]


class Result(NamedTuple):
    losses: list[float]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    converted: Tensor


def run(
    order: tuple[str, ...], folder: Path, *, resume: bool = False, example_inputs: Any = None
) -> Run:
    """Train from one common start, or from the middle in a fresh model."""
    torch.manual_seed(0)
    teacher, model = toys.ConvNet(6, dropout=0.5), toys.ConvNet(dropout=0.3)
    configs = {
        "distillation": DistillationConfig(teacher, criterion("KL", 4.0)),
        "qat": QATConfig(),
        "checkpoint": CheckpointConfig(
            folder / "checkpoints",
            save_every_steps=1,
            metric="loss",
            lower_is_better=True,
            keep_last=2 * EPOCHS * STEPS_PER_EPOCH,
        ),
        "tensorboard": TensorBoardConfig(folder / "tensorboard", detail_every_steps=2),
    }
    manager = prepare_compression(
        model, [configs[name] for name in order], example_inputs=example_inputs
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    manager.track(optimizer=optimizer, scheduler=scheduler)
    if resume:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        torch.manual_seed(1)
        position = manager.resume(folder / "checkpoints" / f"step-{MIDDLE:08d}")
        assert position == Position(0, MIDDLE, MIDDLE)

    def after_step(epoch: int, step: int, loss: Tensor) -> None:
        if step == STEPS_PER_EPOCH - 1:
            scheduler.step()

    loader = toys.loader(toys.images(8 * STEPS_PER_EPOCH))
    return Run(manager, toys.train(manager, loader, optimizer, EPOCHS, after_step=after_step))


def result(trained: Run) -> Result:
    state = copy.deepcopy(trained.manager.state_dict())
    converted = trained.manager.convert()(INPUTS)
    return Result(trained.losses, state["model"], state["tracked"]["optimizer"], converted)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return result(run(NAMES, tmp_path_factory.mktemp("expected")))


# The run that is resumed writes the checkpoints of the whole one again.
@pytest.mark.filterwarnings("ignore:checkpoint. .* holds checkpoints newer:UserWarning")
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order_gives_the_same_result(
    order: tuple[str, ...], expected: Result, tmp_path: Path
) -> None:
    whole = run(order, tmp_path)
    toys.assert_identical(result(whole), expected)
    resumed = run(order, tmp_path, resume=True)
    assert resumed.losses == expected.losses[MIDDLE:]
    toys.assert_identical(result(resumed)[1:], expected[1:])
    toys.assert_identical(resumed.manager.state_dict(), whole.manager.state_dict())
    saved = resumed.manager.save_converted(tmp_path / "converted")
    assert torch.equal(load(saved, toys.ConvNet())(INPUTS), expected.converted)
    for manager in (whole.manager, resumed.manager):
        manager.close()
        assert type(manager.model.conv1) is torch.nn.Conv2d


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]], ids="-".join)
def test_example_inputs_make_no_difference(
    order: tuple[str, ...], expected: Result, tmp_path: Path
) -> None:
    toys.assert_identical(result(run(order, tmp_path, example_inputs=INPUTS)), expected)


def test_the_comparison_is_of_something(expected: Result) -> None:
    """Training moves the weights, distillation and quantization take part."""
    assert len(expected.losses) == EPOCHS * STEPS_PER_EPOCH
    assert len(set(expected.losses)) == len(expected.losses)
    assert "conv1.input_quantizer.scale" in expected.model
    assert len(expected.optimizer["state"]) > 0
    assert expected.converted.unique().numel() > 16
