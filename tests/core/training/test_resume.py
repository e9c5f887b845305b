"""A resumed run ends with the same bits as one that was never stopped."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

import toys
from compression_manager import CompressionManager, LifecycleError, prepare_compression
from compression_manager.testing import differences
from probes import probe, run_step
from resuming import EPOCHS, STEPS, Setup, Training

SETUPS = [
    Setup(),
    Setup("adamw", own_generator="loader", after=False),
    Setup("adamw", own_generator="batch_sampler", set_to_none=False),
    Setup(accumulate=3, own_generator="loader"),
    Setup("adamw", accumulate=3, set_to_none=False, track_loader=True),
]


def _uninterrupted(setup: Setup) -> tuple[Training, dict[int, Any]]:
    states: dict[int, Any] = {}

    def save(manager: CompressionManager, count: int) -> None:
        states[count] = copy.deepcopy(manager.state_dict())

    training = Training.start(setup)
    training.run(save)
    return training, states


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_from_every_step(setup: Setup) -> None:
    expected, states = _uninterrupted(setup)
    assert len(states) == EPOCHS * STEPS
    for count, state in states.items():
        resumed = Training.start(setup, seed=100 + count)
        resumed.manager.load_state_dict(state)
        assert differences(resumed.manager.state_dict(), state) == []
        assert resumed.manager.position == type(resumed.manager.position)(
            count // STEPS, count % STEPS + 1, (count + 1) // setup.accumulate
        )
        torch.rand(3)  # whatever is drawn between loading and training must not matter
        resumed.run()
        assert resumed.losses == expected.losses[count + 1 :]
        assert differences(resumed.final(), expected.final()) == []


def test_saving_in_hooks_is_the_same_as_in_the_body() -> None:
    states: list[Any] = []

    def on_step_end(self: Any, context: Any) -> None:
        states.append(copy.deepcopy(context.collect_state()))

    setup = Setup(accumulate=3)
    training = Training.start(setup, plugins=[probe(on_step_end=on_step_end)])
    training.run()
    _, in_body = _uninterrupted(setup)
    for count, state in in_body.items():
        assert state["step"] == states[count]["step"] == count % STEPS + 1
        for part in ("epoch", "global_step", "model", "gradients", "tracked", "loader", "random"):
            assert differences(states[count][part], state[part]) == [], part


@pytest.mark.parametrize("own_generator", [None, "loader"])
def test_from_every_end_of_an_epoch(own_generator: str | None) -> None:
    states: list[Any] = []

    def on_epoch_end(self: Any, context: Any) -> None:
        states.append(copy.deepcopy(context.collect_state()))

    setup = Setup(own_generator=own_generator, track_loader=True)
    expected = Training.start(setup, plugins=[probe(on_epoch_end=on_epoch_end)])
    expected.run()
    for epoch, state in enumerate(states, start=1):
        resumed = Training.start(setup, seed=20, plugins=[probe()])
        resumed.manager.load_state_dict(state)
        assert differences(resumed.manager.state_dict(), state) == []
        next(iter(resumed.loader))  # draws from the loader's generator
        resumed.run()
        assert resumed.losses == expected.losses[epoch * STEPS :]
        assert differences(resumed.final(), expected.final()) == []


def test_after_a_break_in_mid_epoch() -> None:
    expected, _ = _uninterrupted(Setup())
    stopped = Training.start(Setup())

    def train() -> None:
        for epoch in stopped.manager.epochs(EPOCHS):
            stopped.begin_epoch()
            for step, (inputs, targets) in stopped.manager.steps(stopped.loader):
                stopped.body(epoch * STEPS + step, inputs, targets)
                if (epoch, step) == (1, 1):
                    return
            stopped.manager.on_before_eval()
            stopped.manager.on_after_eval({"bias": stopped.bias()})

    train()
    state = copy.deepcopy(stopped.manager.state_dict())
    resumed = Training.start(Setup(), seed=1)
    resumed.manager.load_state_dict(state)
    resumed.run()
    assert stopped.losses + resumed.losses == expected.losses
    assert differences(resumed.final(), expected.final()) == []


@pytest.mark.parametrize("own_generator", [None, "loader"])
def test_twice_in_one_epoch(own_generator: str | None) -> None:
    setup = Setup(own_generator=own_generator)
    expected, states = _uninterrupted(setup)
    second: dict[int, Any] = {}

    def save(manager: CompressionManager, count: int) -> None:
        second[count] = copy.deepcopy(manager.state_dict())

    first = Training.start(setup, seed=1)
    first.manager.load_state_dict(states[5])
    first.run(save)
    resumed = Training.start(setup, seed=2)
    resumed.manager.load_state_dict(second[6])
    resumed.run()
    assert resumed.losses == expected.losses[7:]
    assert differences(resumed.final(), expected.final()) == []


def test_one_state_serves_several_runs() -> None:
    setup = Setup(accumulate=3)
    expected, states = _uninterrupted(setup)
    state = states[6]
    untouched = copy.deepcopy(state)
    for seed in (1, 2):
        resumed = Training.start(setup, seed=seed)
        resumed.manager.load_state_dict(state)
        resumed.run()
        assert differences(resumed.final(), expected.final()) == []
        assert differences(state, untouched) == []


@pytest.mark.parametrize(
    "setup",
    [Setup(), Setup("adamw", own_generator="loader", track_loader=True), Setup(accumulate=3)],
    ids=str,
)
def test_plain_loop_at_the_ends_of_epochs(setup: Setup) -> None:
    states: dict[int, Any] = {}
    expected = Training.start(setup)
    expected.run_plain(
        lambda epoch: states.update({epoch: copy.deepcopy(expected.manager.state_dict())})
    )
    for epoch, state in states.items():
        resumed = Training.start(setup, seed=50)
        resumed.manager.load_state_dict(state)
        next(iter(resumed.loader))  # draws from the loader's generator
        assert resumed.manager.position.epoch == epoch + 1
        resumed.run_plain()
        assert resumed.losses == expected.losses[(epoch + 1) * STEPS :]
        assert differences(resumed.final(), expected.final()) == []


def test_loader_given_to_on_train_begin_is_known_in_time() -> None:
    def run(training: Training) -> None:
        manager = training.manager
        manager.on_train_begin(training.loader)
        for epoch in range(manager.position.epoch, EPOCHS):
            manager.on_epoch_begin(epoch)
            for step, (inputs, targets) in enumerate(training.loader):
                manager.on_step_begin(step)
                training.body(step, inputs, targets)
                manager.on_step_end()
            manager.on_epoch_end()
            states.append(copy.deepcopy(manager.state_dict()))

    states: list[Any] = []
    setup = Setup(own_generator="loader")
    expected = Training.start(setup)
    run(expected)
    resumed = Training.start(setup, seed=9)
    resumed.manager.load_state_dict(states[0])
    run(resumed)
    assert resumed.losses == expected.losses[STEPS:]


def test_unknown_loader_with_a_generator_is_refused_before_the_first_step() -> None:
    setup = Setup(own_generator="loader", track_loader=True, draw_between_epochs=False)
    states: list[Any] = []
    training = Training.start(setup)
    training.run_plain(lambda epoch: states.append(copy.deepcopy(training.manager.state_dict())))
    untracked = dataclasses.replace(setup, track_loader=False)
    resumed = Training.start(untracked)
    resumed.manager.load_state_dict(states[0])
    text = r"register it with manager.track\(dataloader=loader\)"
    with pytest.raises(LifecycleError, match=text):
        resumed.run_plain()
    by_steps = Training.start(untracked)
    by_steps.manager.load_state_dict(states[0])
    by_steps.run()
    assert by_steps.losses == training.losses[STEPS:]


def test_stop_request_and_evaluations_come_back() -> None:
    def on_after_eval(self: Any, context: Any) -> None:
        context.request_stop("enough")

    manager = prepare_compression(torch.nn.Linear(1, 1), [probe(on_after_eval=on_after_eval)])
    manager.on_before_eval()
    manager.on_after_eval({"accuracy": 0.25})
    other = prepare_compression(torch.nn.Linear(1, 1), [probe()])
    other.load_state_dict(manager.state_dict())
    assert (other.should_stop, other.stop_reason) == (True, "enough")
    assert other.evaluations == manager.evaluations
    assert list(other.epochs(3)) == []


def test_evaluations_of_a_state_are_its_own() -> None:
    def evaluated(manager: CompressionManager) -> CompressionManager:
        manager.on_before_eval()
        manager.on_after_eval({})
        return manager

    state = evaluated(prepare_compression(toys.mlp(), [probe()])).state_dict()
    manager = prepare_compression(toys.mlp(), [probe()])
    manager.load_state_dict(state)
    saved = evaluated(manager).state_dict()
    evaluated(manager)
    found = [len(item) for item in (state["evaluations"], saved["evaluations"])]
    assert found == [1, 2]


def test_a_second_training_after_the_resumed_one_is_like_any_other() -> None:
    first, resumed = (prepare_compression(toys.mlp(), [probe()]) for _ in range(2))
    _epoch(first, 0)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    _epoch(resumed, 1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    resumed.on_train_begin()
    assert torch.equal(torch.rand(3), expected)  # the random state of the save is used once
    resumed.on_epoch_begin(0)


def _epoch(manager: CompressionManager, epoch: int) -> None:
    manager.on_train_begin()
    manager.on_epoch_begin(epoch)
    run_step(manager, 0)
    manager.on_epoch_end()
    manager.on_train_end()


class _StatefulLoader:
    """Keeps its own position, like torchdata's."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Any:
        while self.next < 4:
            self.next += 1
            yield self.next - 1
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: Any) -> None:
        self.next = state["next"]


def test_a_tracked_loader_with_state_says_nothing_about_another_one() -> None:
    def start() -> CompressionManager:
        manager = prepare_compression(torch.nn.Linear(1, 1), [probe()])
        manager.track(dataloader=_StatefulLoader())
        return manager

    manager = start()
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for step, _ in manager.steps(range(4)):
        if step == 1:
            break
    resumed = start()
    resumed.load_state_dict(copy.deepcopy(manager.state_dict()))
    assert [list(resumed.steps(range(4))) for _ in resumed.epochs(1)] == [[(2, 2), (3, 3)]]


def test_the_generator_of_a_sampler_is_saved_where_nothing_makes_batches() -> None:
    generator = torch.Generator()
    data = list(torch.arange(4.0))
    sampler = RandomSampler(data, generator=generator)
    manager = prepare_compression(toys.mlp(), [probe()])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    list(manager.steps(DataLoader(data, batch_size=None, sampler=sampler)))
    (saved,) = manager.state_dict()["loader"]["generators"]
    assert torch.equal(saved, generator.get_state())


def test_loader_with_its_own_state_continues_by_itself() -> None:
    def start() -> tuple[CompressionManager, _StatefulLoader]:
        loader = _StatefulLoader()
        manager = prepare_compression(torch.nn.Linear(1, 1), [probe()])
        manager.track(dataloader=loader)
        return manager, loader

    manager, loader = start()
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for step, _ in manager.steps(loader):
        if step == 1:
            break
    state = copy.deepcopy(manager.state_dict())
    resumed, loader = start()
    resumed.load_state_dict(state)
    assert [list(resumed.steps(loader)) for _ in resumed.epochs(2)] == [
        [(2, 2), (3, 3)],
        [(0, 0), (1, 1), (2, 2), (3, 3)],
    ]
