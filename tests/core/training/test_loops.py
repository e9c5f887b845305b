"""`epochs` and `steps` fire the paired events around the user's body."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from compression_manager import (
    ConfigError,
    LifecycleError,
)
from loop_runs import BATCHES, STEPS, WRAPPERS, Run, run_through
from probes import probe


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return WRAPPERS[request.param]


def test_normal_end(wrap: Any) -> None:
    run = Run()
    seen = [
        (epoch, step, batch)
        for epoch in wrap(run.manager.epochs(2))
        for step, batch in wrap(run.manager.steps(BATCHES))
    ]
    assert seen == [(e, s, b) for e in range(2) for s, b in enumerate(BATCHES)]
    assert run.events == f"T+ E+ {STEPS} E- E+ {STEPS} E- T-"
    assert (run.manager.position.epoch, run.manager.position.step) == (2, 0)
    run.manager.on_train_begin()


def test_steps_alone() -> None:
    run = Run()
    run.manager.on_train_begin()
    assert list(run.manager.steps(BATCHES)) == [(0, "a"), (1, "b"), (2, "c")]
    run.manager.on_train_end()
    assert run.events == f"T+ {STEPS} T-"


def test_should_stop_ends_after_the_epoch() -> None:
    def on_step_end(self: Any, context: Any) -> None:
        if context.epoch == 1:
            context.request_stop("enough")

    run = Run(probe("stops", on_step_end=on_step_end))
    for _ in run.manager.epochs(9):
        for _ in run.manager.steps(BATCHES):
            pass
    assert run.events == f"T+ E+ {STEPS} E- E+ {STEPS} E- T-"
    assert run.manager.should_stop
    assert run.manager.stop_reason == "enough"
    assert list(run.manager.epochs(9)) == []


def test_epochs_go_on_from_the_position() -> None:
    run = Run()
    for total, expected in ((1, [0]), (3, [1, 2]), (3, [])):
        seen = []
        for epoch in run.manager.epochs(total):
            seen.append(epoch)
            list(run.manager.steps(BATCHES))
        assert seen == expected


@pytest.mark.parametrize("loader", [[], range(0)])
def test_empty_loader(loader: Any) -> None:
    run = Run()
    with pytest.raises(ConfigError, match=r"yielded no batch; check .*batch_size and drop_last"):
        run_through(run, batches=loader)
    assert run.events == "T+ E+ X"
    assert run.manager._lifecycle.closed


def test_an_iterator_is_used_up_after_one_epoch() -> None:
    run = Run()
    batches = (batch for batch in BATCHES)
    with pytest.raises(ConfigError, match=r"generator\) yielded no batch; it is an iterator"):
        run_through(run, batches=batches)
    assert run.events == f"T+ E+ {STEPS} E- E+ X"


@pytest.mark.parametrize("total", [np.int64(1), torch.tensor(1)])
def test_whole_numbers_of_other_libraries(total: Any) -> None:
    run = Run()
    for _ in run.manager.epochs(total):
        list(run.manager.steps(BATCHES))
    assert run.manager.position.epoch == 1


@pytest.mark.parametrize("loader", [None, 3])
def test_no_loader(loader: Any) -> None:
    with pytest.raises(ConfigError, match="steps takes a data loader"):
        Run().manager.steps(loader)


@pytest.mark.parametrize("total", [-1, 1.5, "3", None, True])
def test_unfit_number_of_epochs(total: Any) -> None:
    run = Run()
    with pytest.raises(ConfigError, match="epochs takes total as a whole number from 0"):
        run.manager.epochs(total)
    assert run.events == ""


def test_failing_loader_is_told_to_the_plugins() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise OSError("disk")

    seen: list[BaseException] = []
    run = Run(probe("b", on_exception=lambda self, error: seen.append(error)))
    with pytest.raises(OSError, match="disk") as raised:
        run_through(run, batches=batches())
    assert seen == [raised.value]
    assert run.events == "T+ E+ S+ S- X"


@pytest.mark.parametrize("kind", ["steps", "epochs"])
def test_nested_loops_of_one_kind_are_refused(kind: str) -> None:
    manager = Run().manager
    if kind == "steps":
        manager.on_train_begin()

    def loop() -> Any:
        return manager.steps(BATCHES) if kind == "steps" else manager.epochs(2)

    def nested() -> None:
        for _ in loop():
            for _ in loop():
                pass

    with pytest.raises(LifecycleError, match="was called twice"):
        nested()
    assert manager._lifecycle.closed
