"""Within an epoch: what can be resumed, what is refused, and with which reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import toys
from compression_manager import (
    CheckpointMismatchError,
    LifecycleError,
    prepare_compression,
)
from compression_manager.testing import differences
from compression_plugins import QATConfig
from probes import begin_step, call_loss, probe
from resuming import Setup, Training

# What a plain loop saves in mid-epoch.
LOST = "no training can be resumed from it"


@pytest.mark.filterwarnings("error")
def test_mid_epoch_of_a_plain_loop_is_told_once_and_refused_with_the_reason() -> None:
    manager = begin_step(prepare_compression(toys.mlp(), [QATConfig()]))
    call_loss(manager)
    manager.on_step_end()
    with pytest.warns(UserWarning, match=LOST):
        state = manager.state_dict()
    manager.state_dict()
    other = prepare_compression(toys.mlp(), [QATConfig()])
    with pytest.raises(CheckpointMismatchError, match=r"write the loop with manager\.steps"):
        other.load_state_dict(state)


@pytest.mark.filterwarnings("error")
def test_behind_the_last_batch_of_a_plain_loop_nothing_is_told() -> None:
    manager = prepare_compression(toys.mlp(), [QATConfig()])
    manager.track(dataloader=[1])
    begin_step(manager)
    call_loss(manager)
    manager.on_step_end()
    manager.state_dict()


def test_a_plain_epoch_after_one_with_steps_is_no_exception() -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    list(manager.steps([1, 2]))
    manager.on_epoch_end()
    manager.on_epoch_begin(1)
    manager.on_step_begin(0)
    manager.on_step_end()
    with pytest.warns(UserWarning, match=LOST):
        state = manager.state_dict()
    with pytest.raises(CheckpointMismatchError, match="saved in mid-epoch"):
        prepare_compression(toys.mlp(), [probe()]).load_state_dict(state)


def test_two_loops_in_one_epoch_are_ambiguous() -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    list(manager.steps([1, 2]))
    for _ in manager.steps([3, 4]):
        break
    with pytest.warns(UserWarning, match=LOST):
        state = manager.state_dict()
    with pytest.raises(CheckpointMismatchError, match="once per epoch"):
        prepare_compression(toys.mlp(), [probe()]).load_state_dict(state)


def _mid_epoch_state(setup: Setup | None = None) -> Any:
    training = Training.start(setup or Setup())
    training.manager.on_train_begin()
    training.manager.on_epoch_begin(0)
    for step, (inputs, targets) in training.manager.steps(training.loader):
        training.body(step, inputs, targets)
        if step == 1:
            break
    return copy.deepcopy(training.manager.state_dict())


def test_plain_loop_after_resuming_in_mid_epoch_says_how_to_write_it() -> None:
    manager = Training.start(Setup()).manager
    manager.load_state_dict(_mid_epoch_state())
    manager.on_train_begin()
    with pytest.raises(LifecycleError, match="resumed at epoch 0; start the loop there"):
        manager.on_epoch_begin(1)
    manager.on_epoch_begin(0)
    with pytest.raises(LifecycleError, match=r"manager\.steps\(loader\).*the 2 batches"):
        manager.on_step_begin(2)


@pytest.mark.parametrize("begun", [False, True])
def test_a_state_saved_before_the_next_step_is_the_one_that_was_resumed(begun: bool) -> None:
    setup = Setup(track_loader=True, own_generator="loader")
    state = _mid_epoch_state(setup)
    manager = Training.start(setup).manager
    manager.load_state_dict(copy.deepcopy(state))
    manager.on_train_begin()
    if begun:
        manager.on_epoch_begin(0)
    again = manager.state_dict()
    assert differences(again["loader"], state["loader"]) == []
    assert (again["epoch"], again["step"]) == (0, 2)


def test_other_loader_than_the_one_trained_with() -> None:
    state = _mid_epoch_state()
    for loader, text in (([1], "ended after 1"), (_with_generator(), "from 1 generators")):
        manager = Training.start(Setup()).manager
        manager.load_state_dict(state)
        manager.on_train_begin()
        manager.on_epoch_begin(0)
        with pytest.raises(CheckpointMismatchError, match=text):
            next(iter(manager.steps(loader)))


def _with_generator() -> Any:
    return Training.start(Setup(own_generator="loader")).loader


@pytest.mark.parametrize("after_loss", [False, True])
def test_state_within_a_step(after_loss: bool) -> None:
    manager = begin_step(prepare_compression(toys.mlp(), [probe()]))
    if not after_loss:
        with pytest.raises(LifecycleError, match="in the middle of a step's work"):
            manager.state_dict()
        return
    call_loss(manager)
    with pytest.warns(UserWarning, match=LOST):
        state = manager.state_dict()
    assert (state["step"], state["accumulating"]) == (1, True)
    manager.on_before_optimizer_step()
    state = manager.state_dict()
    assert (state["step"], state["global_step"], state["accumulating"]) == (1, 1, False)


def test_plugin_that_saves_while_an_update_is_announced_is_named() -> None:
    def save(self: Any, context: Any) -> None:
        context.collect_state()

    manager = begin_step(
        prepare_compression(toys.mlp(), [probe("culprit", on_before_optimizer_step=save)])
    )
    call_loss(manager)
    with pytest.raises(LifecycleError, match="in the middle of a step's work") as error:
        manager.on_before_optimizer_step()
    assert "culprit" in error.value.__notes__[0]
