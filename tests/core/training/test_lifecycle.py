"""Hooks in a wrong order are refused, with a text that helps, and change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import toys
from compression_manager import CompressionManager, ConfigError, LifecycleError, prepare_compression
from compression_manager.testing import Event, RecordingPlugin
from compression_plugins import QATConfig
from probes import call_loss

CALLS = {
    "train+": lambda m: m.on_train_begin(),
    "epoch+": lambda m: m.on_epoch_begin(0),
    "step+": lambda m: m.on_step_begin(0),
    "loss": lambda m: call_loss(m),
    "update+": lambda m: m.on_before_optimizer_step(),
    "update-": lambda m: m.on_after_optimizer_step(),
    "step-": lambda m: m.on_step_end(),
    "eval+": lambda m: m.on_before_eval(),
    "eval-": lambda m: m.on_after_eval({"accuracy": 0.5}),
    "epoch-": lambda m: m.on_epoch_end(),
    "train-": lambda m: m.on_train_end(),
    "close": lambda m: m.close(),
    "load": lambda m: m.load_state_dict({}),
    "resume": lambda m: m.resume("nowhere"),
    "track": lambda m: m.track(),
    "convert": lambda m: m.convert(),
    "save": lambda m: m.state_dict(),
}


def _prepared(log: list[Event]) -> CompressionManager:
    return prepare_compression(toys.mlp(), [RecordingPlugin(events=log)])


def _observable(manager: CompressionManager, log: list[Event]) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "log": [event.hook for event in log],
            "lifecycle": vars(manager._lifecycle),
            "position": manager.position,
            "global_step": manager._context.global_step,
            "epoch": (manager._context.epoch, manager._context.step),
            "evaluations": manager.evaluations,
            "tracked": list(manager._context.tracked),
            "metrics": manager._context.metrics._pending,
        }
    )


WRONG = [
    ("", "epoch+", "on_epoch_begin was called before on_train_begin"),
    ("", "step+", "on_step_begin was called before on_train_begin"),
    ("", "loss", "on_after_compute_loss was called before on_train_begin"),
    ("", "update+", "on_before_optimizer_step was called before on_train_begin"),
    ("", "update-", "on_after_optimizer_step was called before on_train_begin"),
    ("", "step-", "on_step_end was called before on_train_begin"),
    ("", "eval-", "without on_before_eval"),
    ("", "epoch-", "without on_epoch_begin"),
    ("", "train-", "on_train_end was called before on_train_begin"),
    ("eval+", "train+", "call on_after_eval first"),
    ("eval+", "eval+", "call on_after_eval first"),
    ("train+", "train+", "call on_train_end in between"),
    ("train+", "loss", "call on_step_begin first"),
    ("train+", "step-", "outside of a step"),
    ("train+", "load", "must be called before on_train_begin"),
    ("train+", "resume", "must be called before on_train_begin"),
    ("train+ epoch+", "epoch+", "call on_epoch_end in between"),
    ("train+ epoch+", "train-", "before the on_epoch_end that on_epoch_begin needs"),
    ("train+ epoch+", "epoch-", "without a single step"),
    ("train+ step+", "epoch+", "inside a step; call on_step_end first"),
    ("train+ step+", "step+", "call on_step_end in between"),
    ("train+ step+", "train-", "before the on_step_end that on_step_begin needs"),
    ("train+ step+", "update+", "before any loss"),
    ("train+ step+", "eval+", "inside a step; call on_step_end first"),
    ("train+ epoch+ step+", "epoch-", "inside a step; call on_step_end first"),
    ("train+ step+ loss", "update-", "without on_before_optimizer_step"),
    ("train+ step+ loss update+", "update+", "before any loss"),
    ("train+ step+ loss update+ update-", "update-", "without on_before_optimizer_step"),
    ("train+ step+ loss update+ update-", "update+", "before any loss"),
    ("train+ step+ loss update+ step-", "update-", "outside of a step"),
    ("train+ step+ loss update+ step- step+", "update-", "without on_before_optimizer_step"),
    ("train+ step+ loss step- eval+", "step+", "between on_before_eval and on_after_eval"),
    ("train+ step+ loss step- eval+", "epoch+", "between on_before_eval and on_after_eval"),
    ("train+ step+ loss step- eval+", "loss", "outside of a step"),
    ("train+ step+ loss step- eval+", "train-", "before the on_after_eval that on_before_eval"),
    ("train+ epoch+ step+ loss step- eval+", "epoch-", "call on_after_eval first"),
    ("train+ epoch+ step+ step- epoch-", "epoch-", "without on_epoch_begin"),
    ("train+ step+", "save", "in the middle of a step's work"),
    *(
        ("eval+ close", name, "closed manager; prepare a new one")
        for name in CALLS
        if name not in ("close", "save")
    ),
]


@pytest.mark.parametrize(("before", "call", "text"), WRONG)
def test_wrong_order(before: str, call: str, text: str) -> None:
    log: list[Event] = []
    manager = _prepared(log)
    for name in before.split():
        CALLS[name](manager)
    expected = _observable(manager, log)
    with pytest.raises(LifecycleError) as error:
        CALLS[call](manager)
    assert text in str(error.value)
    assert _observable(manager, log) == expected


RIGHT = [
    "train+ epoch+ step+ loss update+ update- step- epoch- train-",
    "train+ epoch+ step+ loss update+ step- step+ loss update+ step- epoch- train-",
    "train+ step+ loss step- step+ loss update+ update- step- train-",
    "train+ step+ loss update+ update- loss update+ update- step- train-",
    "train+ step+ loss loss update+ step- train-",
    "eval+ eval- train+ train- train+ epoch+ step+ step- eval+ eval- eval+ eval- epoch- train-",
    "train+ epoch+ step+ loss step- epoch- eval+ eval- epoch+ step+ step- epoch- train-",
    "train+ step+ step- train- eval+ eval-",
]


@pytest.mark.parametrize("calls", RIGHT)
def test_right_order_reaches_the_plugins(calls: str) -> None:
    log: list[Event] = []
    manager = _prepared(log)
    del log[:]
    for name in calls.split():
        CALLS[name](manager)
    hooks = [event.hook for event in log if event.hook != "consume_metrics"]
    names = {
        "train+": "on_train_begin",
        "epoch+": "on_epoch_begin",
        "step+": "on_step_begin",
        "loss": "on_after_compute_loss",
        "update+": "on_before_optimizer_step",
        "update-": "on_after_optimizer_step",
        "step-": "on_step_end",
        "eval+": "on_before_eval",
        "eval-": "on_after_eval",
        "epoch-": "on_epoch_end",
        "train-": "on_train_end",
    }
    assert hooks == [names[call] for call in calls.split()]


@pytest.mark.parametrize("value", [-1, 1.5, "0", None, True])
@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_step_begin"])
def test_numbers_of_epochs_and_steps(hook: str, value: Any) -> None:
    log: list[Event] = []
    manager = _prepared(log)
    manager.on_train_begin()
    expected = _observable(manager, log)
    with pytest.raises(ConfigError, match=f"{hook} takes .* as a whole number from 0"):
        getattr(manager, hook)(value)
    assert _observable(manager, log) == expected


def test_integers_of_other_types_are_numbers() -> None:
    manager = _prepared([])
    manager.on_train_begin()
    manager.on_epoch_begin(torch.tensor(2))
    assert manager.position.epoch == 2
    assert type(manager.position.epoch) is int


def test_unfit_dataloader_does_not_begin_training() -> None:
    log: list[Event] = []
    manager = _prepared(log)
    expected = _observable(manager, log)
    with pytest.raises(Exception, match="iterable of batches"):
        manager.on_train_begin(3)
    assert _observable(manager, log) == expected


def test_a_loop_that_never_announces_an_update_is_told_once() -> None:
    manager = prepare_compression(toys.mlp(), [QATConfig()])
    manager.on_train_begin()
    with pytest.warns(UserWarning, match="10 losses.*on_before_optimizer_step"):
        _epoch_without_updates(manager, 0)
    _epoch_without_updates(manager, 1)  # warnings are errors in tests
    manager.on_train_end()
    manager.close()


def test_a_loop_without_epochs_that_never_announces_an_update_is_told_at_its_end() -> None:
    manager = prepare_compression(toys.mlp(), [QATConfig()])
    manager.on_train_begin()
    _steps_without_updates(manager)
    with pytest.warns(UserWarning, match="10 losses.*on_before_optimizer_step"):
        manager.on_train_end()
    manager.close()


def test_a_loop_that_announces_updates_is_told_nothing() -> None:
    manager = prepare_compression(toys.mlp(), [QATConfig()])
    manager.on_train_begin()
    _epoch_without_updates(manager, 0, announced=True)
    manager.on_train_end()
    manager.close()


def _epoch_without_updates(manager, epoch: int, *, announced: bool = False) -> None:
    manager.on_epoch_begin(epoch)
    _steps_without_updates(manager, announced=announced)
    manager.on_epoch_end()


def _steps_without_updates(manager, *, announced: bool = False) -> None:
    for step in range(10):
        manager.on_step_begin(step)
        output = manager.model(torch.randn(2, 6))
        manager.on_after_compute_loss(None, output, output.mean())
        if announced and step == 9:
            manager.on_before_optimizer_step()
        manager.on_step_end()
