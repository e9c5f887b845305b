"""A loop that is left early ends in order, unless its body raised."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from tqdm import tqdm

from compression_manager import (
    CompressionManager,
    ConfigError,
    LifecycleError,
    PluginError,
)
from loop_runs import BATCHES, STEPS, WRAPPERS, Run
from probes import call_loss, probe


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return WRAPPERS[request.param]


def test_break_out_of_steps(wrap: Any) -> None:
    run = Run()
    for _ in run.manager.epochs(2):
        for step, _ in wrap(run.manager.steps(BATCHES)):
            if step == 1:
                break
        run.manager.on_before_eval()
        run.manager.on_after_eval({})
    assert run.events == "T+ E+ S+ S- S+ S- E- E+ S+ S- S+ S- E- T-"
    assert run.manager.position.epoch == 2


def test_break_out_of_epochs(wrap: Any) -> None:
    run = Run()
    for epoch in wrap(run.manager.epochs(5)):
        for _ in run.manager.steps(BATCHES):
            pass
        if epoch == 1:
            break
    assert run.events == f"T+ E+ {STEPS} E- E+ {STEPS} E- T-"
    assert (run.manager.position.epoch, run.manager.position.step) == (2, 0)
    assert not run.manager._lifecycle.closed


def test_return_out_of_both(wrap: Any) -> None:
    run = Run()

    def train() -> str:
        for _ in wrap(run.manager.epochs(5)):
            for step, _ in wrap(run.manager.steps(BATCHES)):
                if step == 1:
                    return "returned"
        return "ended"

    assert train() == "returned"
    assert run.events == "T+ E+ S+ S- S+ S- E- T-"
    # The batches are not used up: a state saved now continues within the epoch.
    assert (run.manager.position.epoch, run.manager.position.step) == (0, 2)
    assert not run.manager._lifecycle.closed


@pytest.mark.parametrize("where", ["body", "inner call", "finally", "with", "reraised"])
def test_raise_without_context_manager(wrap: Any, where: str) -> None:
    run = Run()

    def train() -> None:
        for _ in wrap(run.manager.epochs(5)):
            for step, _ in wrap(run.manager.steps(BATCHES)):
                if step == 1:
                    _fail(where)

    with pytest.raises(KeyError, match="body"):
        train()
    assert run.events == "T+ E+ S+ S- S+ X"
    assert run.manager._lifecycle.closed


def _fail(where: str) -> None:
    if where == "finally":
        try:
            raise KeyError("body")
        finally:
            where = ""
    if where == "with":
        with open("/dev/null"):
            raise KeyError("body")
    if where == "reraised":
        try:
            raise KeyError("body")
        except KeyError:
            raise
    if where == "inner call":
        {}["body"]
    raise KeyError("body")


@pytest.mark.parametrize(
    "kind", ["try-finally", "with", "except", "expression", "call", "attribute"]
)
def test_raise_at_every_kind_of_instruction(kind: str) -> None:
    run = Run()

    def train() -> None:
        for _ in run.manager.steps(BATCHES):
            if kind == "try-finally":
                try:
                    raise ValueError
                finally:
                    kind.upper()
            elif kind == "with":
                with open("/dev/null"):
                    raise ValueError
            elif kind == "except":
                try:
                    raise ValueError
                except KeyError:
                    pass
            elif kind == "expression":
                1 / 0
            elif kind == "call":
                int("x")
            elif kind == "attribute":
                kind.no_such_attribute

    run.manager.on_train_begin()
    with pytest.raises((ValueError, ZeroDivisionError, AttributeError)):
        train()
    assert run.events == "T+ S+ X"


@pytest.mark.parametrize("kind", ["with", "finally", "except"])
def test_break_at_every_kind_of_instruction(kind: str) -> None:
    run = Run()
    run.manager.on_train_begin()
    for _ in run.manager.steps(BATCHES):
        if kind == "with":
            with open("/dev/null"):
                break
        if kind == "finally":
            try:
                break
            finally:
                kind.upper()
        try:
            raise ValueError
        except ValueError:
            break
    assert run.events == "T+ S+ S-"


def test_raise_inside_of_with_manager(wrap: Any) -> None:
    seen: list[BaseException] = []
    run = Run(probe("b", on_exception=lambda self, error: seen.append(error)))
    error = KeyError("body")

    def train() -> None:
        with run.manager as manager:
            for _ in wrap(manager.epochs(5)):
                for _ in wrap(manager.steps(BATCHES)):
                    raise error

    with pytest.raises(KeyError) as raised:
        train()
    assert raised.value is error
    assert seen == [error]
    assert run.events == "T+ E+ S+ X"
    assert run.manager._lifecycle.closed


def test_exception_handled_inside_of_with_manager_lets_training_go_on() -> None:
    run = Run()
    with run.manager as manager:
        for _ in manager.epochs(2):
            try:
                for step, _ in manager.steps(BATCHES):
                    if step == 1:
                        raise ValueError
            except ValueError:
                continue
    assert run.events == "T+ E+ S+ S- S+ E- E+ S+ S- S+ E- T-"


def test_exception_handled_without_a_context_manager_is_told_once_and_ends_the_loop() -> None:
    run = Run()

    def train() -> None:
        for _ in run.manager.epochs(2):
            try:
                for _ in run.manager.steps(BATCHES):
                    raise KeyError("body")
            except KeyError:
                continue

    closed = "an exception in its loop has closed"
    with pytest.raises(LifecycleError, match=closed):
        train()
    assert run.events == "T+ E+ S+ X"
    with pytest.raises(LifecycleError, match=closed):
        run.manager.convert()


def test_update_of_a_step_whose_body_raised_is_not_counted() -> None:
    run = Run()
    with run.manager as manager:
        for _ in manager.epochs(1):
            try:
                for _ in manager.steps(BATCHES):
                    call_loss(manager)
                    manager.on_before_optimizer_step()
                    raise ValueError
            except ValueError:
                list(manager.steps(BATCHES))
        assert manager.position.global_step == 0


@pytest.mark.parametrize("handled", ["in the step", "around the steps"])
def test_state_can_be_saved_after_a_plugin_refused_an_update(handled: str) -> None:
    def refuse(self: Any) -> None:
        raise ConfigError("not yet")

    run = Run(probe("refusing", on_before_optimizer_step=refuse))
    with run.manager as manager:
        manager.on_train_begin()
        try:
            for _ in manager.steps(BATCHES):
                call_loss(manager)
                try:
                    manager.on_before_optimizer_step()
                except ConfigError:
                    if handled == "around the steps":
                        raise
        except ConfigError:
            pass
        for _ in manager.steps(BATCHES):
            call_loss(manager)
            with pytest.warns(UserWarning, match="no training can be resumed"):  # a second loop
                assert manager.state_dict()["step"] == 1
            break


def test_training_after_one_that_was_abandoned_begins_anew() -> None:
    run = Run()
    with run.manager as manager:
        for where in ("evaluation", "step"):
            with pytest.raises(ValueError, match=where):
                _raise_in(manager, where)
        assert not manager.state_dict()["accumulating"]
        for _ in manager.epochs(1):
            list(manager.steps(BATCHES))
    assert run.events.endswith(f"T+ E+ {STEPS} E- T-")


def _raise_in(manager: CompressionManager, where: str) -> None:
    for _ in manager.epochs(1):
        for _ in manager.steps(BATCHES):
            call_loss(manager)
            if where == "step":
                raise ValueError(where)
        manager.on_before_eval()
        raise ValueError(where)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_limited_from_outside(limit: int) -> None:
    run = Run()
    for _ in run.manager.epochs(1):
        for _ in itertools.islice(run.manager.steps(BATCHES), limit):
            pass
    assert run.events == f"T+ E+{' S+ S-' * limit} E- T-"


@pytest.mark.parametrize("disable", [False, True])
def test_a_bar_that_outlives_its_loop(disable: bool) -> None:
    run = Run()
    for _ in run.manager.epochs(2):
        bar = tqdm(run.manager.steps(BATCHES), disable=disable, file=io.StringIO())
        for step, _ in bar:
            if step == 1:
                break
    assert run.events == "T+ E+ S+ S- S+ S- E- E+ S+ S- S+ S- E- T-"
    del bar
    assert run.events.endswith("E- T-")


@pytest.mark.parametrize("disable", [False, True])
def test_a_bar_that_outlives_a_return(disable: bool) -> None:
    run = Run()

    def train() -> None:
        epochs = tqdm(run.manager.epochs(2), disable=disable, file=io.StringIO())
        for _ in epochs:
            steps = tqdm(run.manager.steps(BATCHES), disable=disable, file=io.StringIO())
            for _ in steps:
                return

    train()
    assert run.events == "T+ E+ S+ S- E- T-"
    assert not run.manager._lifecycle.closed


def test_a_step_ended_by_hand_is_not_ended_again() -> None:
    run = Run()
    run.manager.on_train_begin()
    loop = run.manager.steps(BATCHES)
    next(loop)
    run.manager.on_step_end()
    del loop
    run.manager.on_train_end()
    assert run.events == "T+ S+ S- T-"


def test_loops_that_outlive_their_step_and_epoch_end_no_later_ones() -> None:
    run = Run()
    epochs = run.manager.epochs(2)
    next(epochs)
    steps = run.manager.steps(BATCHES)
    next(steps)
    run.manager.on_step_end()
    run.manager.on_epoch_end()
    run.manager.on_epoch_begin(1)
    run.manager.on_step_begin(0)
    del steps
    run.manager.on_step_end()
    del epochs
    run.manager.on_epoch_end()
    run.manager.on_train_end()
    assert run.events == "T+ E+ S+ S- E- E+ S+ S- E- T-"


def test_a_manager_that_was_closed_within_a_step_may_be_closed_again() -> None:
    run = Run()
    run.manager.on_train_begin()
    for _ in run.manager.steps(BATCHES):
        run.manager.close()
        break
    run.manager.close()
    assert run.events == "T+ S+"


def test_break_before_the_first_step_counts_for_nothing() -> None:
    run = Run()
    for epoch in run.manager.epochs(3):
        if epoch == 1:
            break
        list(run.manager.steps(BATCHES))
    assert run.events == f"T+ E+ {STEPS} E- E+ T-"
    assert run.manager.position.epoch == 1
    run.manager.close()


def test_break_before_the_evaluation_that_a_plugin_needs() -> None:
    run = Run(probe("needy", required_hooks=lambda self: frozenset({"on_after_eval"})))
    for _ in run.manager.epochs(3):
        for _ in run.manager.steps(BATCHES):
            break
        break
    assert run.events == "T+ E+ S+ S- E- T-"
    run.manager.close()


@pytest.mark.parametrize("hook", ["on_step_end", "on_epoch_end", "on_train_end"])
@pytest.mark.parametrize("then", ["close", "with", "convert", "on_train_begin"])
def test_hook_that_fails_while_a_loop_is_left_raises_at_the_next_call(hook: str, then: str) -> None:
    def fail(self: Any) -> None:
        raise OSError("disk")

    run = Run(probe("culprit", **{hook: fail}))

    def train(manager: CompressionManager) -> None:
        for _ in manager.epochs(2):
            for _ in manager.steps(BATCHES):
                call_loss(manager)
                return

    def go_on(manager: CompressionManager) -> None:
        if then == "with":
            with manager:
                train(manager)
        else:
            train(manager)
            getattr(manager, then)()

    with pytest.raises(PluginError) as error:
        go_on(run.manager)
    assert (error.value.plugin, error.value.hook) == ("culprit", hook)
    if then in ("with", "close"):
        assert run.manager._lifecycle.closed
    run.manager.close()
