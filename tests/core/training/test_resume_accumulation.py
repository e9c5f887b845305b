"""Gradients of an unfinished accumulation are resumed, those of tracked modules too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import toys
from compression_manager import CheckpointMismatchError, CompressionManager, prepare_compression
from compression_manager.testing import assert_identical
from probes import loss_of, probe


class Wrapper(nn.Module):
    """Stands for what wraps a model, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _start(seed: int, *, wrap: bool = False) -> tuple[CompressionManager, Any, nn.Module]:
    torch.manual_seed(seed)
    model = toys.mlp()
    head = nn.Linear(model(torch.ones(2, 6)).shape[1], 1)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], 0.1)
    manager = prepare_compression(model, [probe()])
    wrapped = {"wrapper": Wrapper(model)} if wrap else {}
    manager.track(optimizer=optimizer, head=head, **wrapped)
    return manager, optimizer, head


def _steps(manager: CompressionManager, optimizer: Any, head: nn.Module, *steps: int) -> None:
    """Run the steps with these numbers, an update after every second one."""
    if not manager._lifecycle.in_epoch:
        manager.on_train_begin()
        manager.on_epoch_begin(manager.position.epoch)
    for step in steps:
        manager.on_step_begin(step)
        inputs = torch.ones(2, 6) * (step + 1)
        output = manager.model(inputs)
        loss = manager.on_after_compute_loss(inputs, output, head(output).square().mean())
        loss.backward()
        if step % 2:
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
        manager.on_step_end()


def _accumulating(*, wrap: bool = False) -> Any:
    """Return a state that was saved between the two steps of an accumulation."""
    manager, optimizer, head = _start(0, wrap=wrap)
    _steps(manager, optimizer, head, 0)
    manager.on_epoch_end()
    return copy.deepcopy(manager.state_dict())


def test_a_head_that_is_tracked_gets_its_whole_update() -> None:
    expected = _start(0)
    _steps(*expected, 0, 1)
    manager, optimizer, head = _start(1)
    manager.load_state_dict(_accumulating())
    _steps(manager, optimizer, head, 1)
    assert_identical(head.state_dict(), expected[2].state_dict())
    assert_identical(manager.model.state_dict(), expected[0].model.state_dict())


@pytest.mark.parametrize("wrap", [False, True])
def test_a_state_without_gradients_of_tracked_modules_leaves_none(wrap: bool) -> None:
    """Earlier releases kept the gradients of the model alone."""
    state = _accumulating(wrap=wrap)
    assert set(state.pop("tracked_gradients")) == {"head", *(["wrapper"] if wrap else [])}
    manager, _, head = _start(1, wrap=wrap)
    loss_of(nn.Sequential(manager.model, head)).backward()
    manager.load_state_dict(state)
    assert all(parameter.grad is None for parameter in head.parameters())
    gradients = {name: value.grad for name, value in manager.model.named_parameters()}
    assert_identical(gradients, state["gradients"])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("weigth", torch.ones(1, 4), "no parameter of 'head'; did you mean 'weight'"),
        ("weight", torch.ones(7), "does not fit the gradients of 'head'"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(name: str, value: Any, text: str) -> None:
    state = _accumulating()
    state["tracked_gradients"]["head"] = {name: value}
    manager, _, head = _start(1)
    loss_of(nn.Sequential(manager.model, head)).backward()
    before = [parameter.grad for parameter in (*manager.model.parameters(), *head.parameters())]
    with pytest.raises(CheckpointMismatchError, match=text):
        manager.load_state_dict(state)
    now = [parameter.grad for parameter in (*manager.model.parameters(), *head.parameters())]
    assert all(a is b for a, b in zip(before, now, strict=True))
