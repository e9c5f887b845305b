"""A state that does not fit is refused with the reason, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toys
from compression_manager import (
    CheckpointError,
    CheckpointMismatchError,
    CompressionManager,
    PluginError,
    prepare_compression,
)
from compression_manager.state import capture_random_state, write_checkpoint
from compression_manager.testing import differences
from compression_manager.training.state_checks import check_parameters
from compression_plugins import QATConfig
from probes import probe
from resuming import Setup, Training


def _everything(manager: CompressionManager) -> Any:
    """Return all that loading may change, by value."""
    return copy.deepcopy(
        {
            "model": manager.model.state_dict(),
            "gradients": {n: p.grad for n, p in manager.model.named_parameters()},
            "plugins": {plugin.name: plugin.state_dict() for plugin in manager._plugins},
            "tracked": manager._context.tracked.state_dict(),
            "random": capture_random_state(),
            "position": tuple(vars_of(manager.position)),
            "context": [manager._context.epoch, manager._context.global_step],
            "stop": [manager.should_stop, manager.stop_reason],
            "evaluations": manager.evaluations,
            "accumulating": manager._lifecycle.accumulating,
            "loader": {
                key: value for key, value in vars(manager._state.loader).items()
                if key not in ("_tracked", "_loader")
            },
        }
    )  # fmt: skip


def vars_of(position: Any) -> list[int]:
    return [position.epoch, position.step, position.global_step]


class Counter:
    """A tracked object; a state of -1 makes it raise when it is half changed."""

    def __init__(self, value: int = 0) -> None:
        self.left, self.right = torch.tensor(value), torch.tensor(value)

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left, "right": self.right}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = state["left"]
        if int(state["right"]) == -1:
            raise RuntimeError("half-way")
        self.right = state["right"]


def _trained() -> Training:
    """A training that has been through two epochs and holds gradients."""
    training = Training.start(Setup(track_loader=True, accumulate=3))
    training.manager.track(counter=Counter(1))
    for epoch in training.manager.epochs(2):
        for step, (inputs, targets) in training.manager.steps(training.loader):
            training.body(epoch * 4 + step, inputs, targets)
        training.manager.on_before_eval()
        training.manager.on_after_eval({"bias": training.bias()})
    assert training.manager.model.fc.weight.grad is not None
    return training


@pytest.fixture(scope="module")
def good_state() -> Any:
    training = Training.start(Setup(track_loader=True, accumulate=3), seed=5)
    training.manager.track(counter=Counter(2))
    for epoch in training.manager.epochs(1):
        for step, (inputs, targets) in training.manager.steps(training.loader):
            training.body(epoch + step, inputs, targets)
    return copy.deepcopy(training.manager.state_dict())


def _without(*path: str) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def _with(value: Any, *path: str) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


UNFIT: dict[str, tuple[Callable[[Any], None], type[Exception], str]] = {
    "no mapping": (lambda s: None, CheckpointError, "expected a mapping, got list"),
    "no model": (_without("model"), CheckpointError, "it lacks model"),
    "other version": (_with(99, "version"), CheckpointError, "version 99; this release reads"),
    "step no number": (_with("3", "step"), CheckpointError, "its 'step' is not what"),
    "loader of another kind": (_with({}, "loader"), CheckpointError, "its 'loader' is not what"),
    "tensor missing": (
        _without("model", "fc.bias"), CheckpointMismatchError, "no 'fc.bias', which the model has"),
    "tensor too many": (
        _with(torch.ones(1), "model", "fc.bais"), CheckpointMismatchError,
        "'fc.bais', which the model lacks; did you mean 'fc.bias'"),
    "tensor of a quantizer": (
        _with(torch.ones(1), "model", "fc.weight_quantizer.scale"), CheckpointMismatchError,
        "Only one of both quantizes the layer 'fc': list the same plugin"),
    "other shape": (
        _with(torch.ones(5), "model", "fc.bias"), CheckpointMismatchError,
        "'fc.bias' is float32 of shape (5,) in the checkpoint and float32 of shape (4,)"),
    "other dtype": (
        _with(torch.ones(4).double(), "model", "fc.bias"), CheckpointMismatchError,
        "'fc.bias' is float64 of shape (4,) in the checkpoint"),
    "gradient too many": (
        _with(torch.ones(1), "gradients", "fc.weigth"), CheckpointMismatchError,
        "gradient of 'fc.weigth', which is no parameter of the model; did you mean 'fc.weight'"),
    "gradient of another shape": (
        _with(torch.ones(1), "gradients", "fc.weight"), CheckpointMismatchError, "the gradients"),
    "plugin too many": (
        _with({"x": 1}, "plugins", "ema"), CheckpointMismatchError,
        "state of plugin 'ema', which is not listed now"),
    "plugin missing": (
        _without("plugins", "qat"), CheckpointMismatchError, "plugin 'qat' keeps state, but"),
    "plugin's state unreadable": (
        _with({"x": 1}, "plugins", "qat"), CheckpointMismatchError, "plugin 'qat'"),
    "tracked missing": (
        _without("tracked", "scheduler"), CheckpointMismatchError, "'scheduler' is tracked, but"),
    "tracked too many": (
        _with({}, "tracked", "scaler"), CheckpointMismatchError,
        "register it with manager.track(scaler=...)"),
    "other optimizer": (
        _with({"param_groups": [], "state": {}}, "tracked", "optimizer"), CheckpointMismatchError,
        "the checkpoint does not fit 'optimizer': ValueError"),
    "parameters in another order": (
        lambda s: s["objects"]["optimizer"]["parameters"][0].reverse(), CheckpointMismatchError,
        "'optimizer' has its parameters in another order: in group 0, 'conv1.weight' stands where "
        "the checkpoint has 'fc.bias'"),
    "tracked raises half-way": (
        _with({"left": torch.tensor(7), "right": torch.tensor(-1)}, "tracked", "counter"),
        CheckpointMismatchError, "does not fit 'counter': RuntimeError: half-way"),
    "random state unreadable": (
        _with(torch.zeros(3, dtype=torch.uint8), "random", "torch"), CheckpointMismatchError,
        "random state does not fit"),
    "mid-epoch without steps": (
        lambda s: (s.update(step=2), s["loader"].update(epoch_start=None)),
        CheckpointMismatchError, "saved in mid-epoch by a loop that does not go through"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_state_changes_nothing(name: str, good_state: Any) -> None:
    change, error, text = UNFIT[name]
    state = copy.deepcopy(good_state)
    change(state)
    manager = _trained().manager
    before = _everything(manager)
    gradients = [parameter.grad for parameter in manager.model.parameters()]
    with pytest.raises(error) as raised:
        manager.load_state_dict([] if name == "no mapping" else state)  # type: ignore[arg-type]
    assert type(raised.value) is error
    assert text in str(raised.value)
    assert differences(_everything(manager), before) == []
    now = [parameter.grad for parameter in manager.model.parameters()]
    assert all(a is b for a, b in zip(gradients, now, strict=True))
    manager.load_state_dict(good_state)
    assert int(manager._context.tracked["counter"].left) == 2
    assert manager.position.epoch == 1


def test_interrupt_while_loading_changes_nothing(good_state: Any) -> None:
    class Interrupted(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            if int(state["left"]) == 2:
                raise KeyboardInterrupt

    manager = _trained().manager
    manager.track(counter=Interrupted(1))
    before = _everything(manager)
    with pytest.raises(KeyboardInterrupt):
        manager.load_state_dict(good_state)
    assert differences(_everything(manager), before) == []


def test_object_that_cannot_go_back_is_named_and_the_rest_goes_back(good_state: Any) -> None:
    class Broken(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise RuntimeError("never")

    manager = _trained().manager
    manager.track(counter=Broken(1))
    before = _everything(manager)
    with pytest.raises(CheckpointMismatchError, match="does not fit 'counter'") as error:
        manager.load_state_dict(good_state)
    assert "'counter' could not be put back" in error.value.__notes__[0]
    assert differences(_everything(manager), before) == []


def test_what_is_loaded_in_place_goes_back() -> None:
    def load(self: Any, state: Any) -> None:
        self.value.copy_(state["value"])

    def trained(value: float) -> tuple[CompressionManager, nn.Module, torch.Tensor]:
        live = torch.full((2,), value)
        plugin = probe("a", value=live, state_dict=lambda self: {"value": live})
        type(plugin).load_state_dict = load
        manager = prepare_compression(toys.mlp(), [plugin])
        head = nn.Linear(2, 2)
        nn.init.constant_(head.weight, value)
        manager.track(head=head, counter=Counter())
        return manager, head, live

    state = copy.deepcopy(trained(2.0)[0].state_dict())
    state["tracked"]["counter"]["right"].fill_(-1)
    manager, head, live = trained(1.0)
    with pytest.raises(CheckpointMismatchError, match="half-way"):
        manager.load_state_dict(state)
    assert torch.equal(head.weight, torch.ones(2, 2))
    assert torch.equal(live, torch.ones(2))


def test_a_parameter_without_a_name_may_stand_where_one_has_a_name() -> None:
    saved, own = ({"o": {"parameters": [[name, "b"]]}} for name in ("", "a"))
    check_parameters(saved, own)
    check_parameters(own, saved)


def test_plugins_without_state_may_be_added_and_left_out() -> None:
    state = prepare_compression(toys.mlp(), [probe("a"), probe("b")]).state_dict()
    prepare_compression(toys.mlp(), [probe("a"), probe("c")]).load_state_dict(state)


def test_plugin_that_refuses_its_state_is_quoted() -> None:
    def load_state_dict(self: Any, state: Any) -> None:
        raise PluginError("my own words", plugin=self.name)

    plugin = probe("a", state_dict=lambda self: {"x": 1}, load_state_dict=load_state_dict)
    manager = prepare_compression(toys.mlp(), [plugin])
    with pytest.raises(PluginError, match="my own words"):
        manager.load_state_dict(manager.state_dict())


def test_model_with_extra_state() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"note": 1}

        def set_extra_state(self, state: Any) -> None:
            self.note = state

    manager = prepare_compression(Extra(1, 1), [probe()])
    other = prepare_compression(Extra(1, 1), [probe()])
    other.load_state_dict(manager.state_dict())
    assert other.model.note == {"note": 1}


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_an_optimizer_or_a_scheduler_of_another_class_is_warned_of(tmp_path: Path) -> None:
    """Their states look alike, and mean something else."""

    def tracked(optimizer: Any, scheduler: Any) -> CompressionManager:
        model = toys.mlp()
        manager = prepare_compression(model, [QATConfig()])
        own = optimizer(model.parameters(), 0.1)
        manager.track(optimizer=own, scheduler=scheduler(own))
        return manager

    def step_rate(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 3)

    def falling_rate(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    path = tmp_path / "step-00000000"
    state = tracked(torch.optim.AdamW, step_rate).state_dict()
    write_checkpoint(path, state, metadata={"epoch": 0, "global_step": 0})
    tracked(torch.optim.AdamW, step_rate).resume(path)
    with pytest.warns(UserWarning, match=r"'optimizer' was a .*AdamW, and is a .*Adam now"):
        tracked(torch.optim.Adam, step_rate).resume(path)
    with pytest.warns(UserWarning, match=r"'scheduler' was a .*StepLR, and is a .*ExponentialLR"):
        tracked(torch.optim.AdamW, falling_rate).resume(path)


def _optimized(optimizer: Any, **options: Any) -> CompressionManager:
    model = toys.mlp()
    manager = prepare_compression(model, [QATConfig()])
    manager.track(optimizer=optimizer(model.parameters(), 0.1, **options))
    return manager


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (torch.optim.SGD, torch.optim.Adam, r"SGD has no amsgrad, betas, .*Adam has no dampening"),
        (torch.optim.Adam, torch.optim.SGD, r"Adam has no dampening, momentum, .*SGD has no amsgr"),
        (torch.optim.RAdam, torch.optim.Adamax, r"Adamax has no decoupled_weight_decay\. To cont"),
    ],
)
def test_an_optimizer_with_other_options_is_refused(before: Any, after: Any, text: str) -> None:
    """torch would take the state, and find no `betas` or `momentum_buffer` in the next step."""
    torch.manual_seed(0)
    state = _optimized(before).state_dict()
    manager = _optimized(after)
    own = copy.deepcopy(manager.state_dict())
    with pytest.raises(CheckpointMismatchError, match=text) as error:
        manager.load_state_dict(state)
    for part in (before.__qualname__, after.__qualname__, "load_weights"):
        assert part in str(error.value)
    assert differences(manager.state_dict(), own) == []


def test_schedulers_may_add_options_to_the_groups_and_a_class_may_gain_some() -> None:
    before = _optimized(torch.optim.AdamW)
    optimizer = before._context.tracked["optimizer"]
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    state = before.state_dict()
    _optimized(torch.optim.Adam).load_state_dict(state)
    state["objects"]["optimizer"]["options"].remove("capturable")  # of another version of torch
    _optimized(torch.optim.AdamW).load_state_dict(state)


def test_an_optimizer_of_unknown_options_is_taken() -> None:
    """Earlier releases did not write them, and what wraps an optimizer may not have them."""

    class Wrapping(torch.optim.Optimizer):
        def __init__(self, parameters: Any, rate: float) -> None:
            wrapped = torch.optim.Adam(parameters, rate)
            self.param_groups, self.state = wrapped.param_groups, wrapped.state

        def state_dict(self) -> Any:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    state = _optimized(torch.optim.SGD).state_dict()
    _optimized(Wrapping).load_state_dict(state)
    del state["objects"]["optimizer"]["options"]
    _optimized(torch.optim.Adam).load_state_dict(state)
