"""The contract finds what is wrong with a plugin, and says what to do about it."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from compression_manager import Plugin, PluginConfig, hookimpl, option
from compression_manager.testing import PluginContract
from compression_manager.testing.contract import conversion
from compression_plugins import QATConfig


@dataclass(frozen=True)
class GoodConfig(PluginConfig):
    plugin: ClassVar[str] = "tested"

    strength: float = field(default=0.01, metadata=option("Factor of the term."))


class Good(Plugin[GoodConfig]):
    """Adds a term, keeps a counter, hooks a layer and tidies up."""

    config_class = GoodConfig

    def __init__(self, config: GoodConfig) -> None:
        super().__init__(config)
        self.count = 0

    @hookimpl
    def prepare_model(self, context: Any) -> None:
        context.model_hooks.add_forward_hook(context.model.fc, lambda *arguments: None)

    @hookimpl
    def on_after_compute_loss(self, context: Any, losses: Any) -> None:
        self.count += 1
        norm = context.model.fc.weight.square().sum()
        losses.add("norm", norm, self.config.strength * self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


Check = Callable[..., str]


@pytest.fixture
def failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """`failure(test, plugin_class, ...)` returns what the contract's test says, or ""."""

    def run(
        test: str,
        plugin_class: type[Plugin[Any]] = Good,
        *arguments: Any,
        config: Callable[[], PluginConfig] | None = None,
        model: Callable[[], nn.Module] | None = None,
    ) -> str:
        members = {
            "plugin_class": plugin_class,
            "make_config": lambda self: (config or plugin_class.config_class)(),
            **({} if model is None else {"make_model": lambda self: model()}),
        }
        contract = type("Contract", (PluginContract,), members)()
        contract._set_up(tmp_path, monkeypatch)
        try:
            getattr(contract, test)(*arguments)
        except AssertionError as error:
            return str(error)
        return ""

    return run


TESTS = [
    pytest.param(name, arguments, id=f"{name} {arguments}")
    for name in dir(PluginContract)
    if name.startswith("test_")
    for arguments in (
        [(moment,) for moment in getattr(PluginContract, name).pytestmark[0].args[1]]
        if hasattr(getattr(PluginContract, name), "pytestmark")
        else [()]
    )
]


@pytest.mark.parametrize(("test", "arguments"), TESTS)
def test_a_good_plugin_passes(failure: Check, test: str, arguments: tuple[str, ...]) -> None:
    assert failure(test, Good, *arguments) == ""


# Options --------------------------------------------------------------------------------------


def with_config(config_class: type[PluginConfig]) -> type[Plugin[Any]]:
    return type("WithConfig", (Good,), {"config_class": config_class})


def test_config_without_its_own_decorator(failure: Check) -> None:
    class Forgotten(PluginConfig):
        plugin: ClassVar[str] = "tested"
        strength: float = 0.01

    found = failure("test_config_is_a_frozen_dataclass", with_config(Forgotten))
    assert "must derive from PluginConfig and have @dataclass(frozen=True) itself" in found


def test_config_that_can_be_changed(failure: Check) -> None:
    @dataclass(frozen=True)
    class Changeable(GoodConfig):
        pass

    Changeable.__setattr__ = object.__setattr__
    found = failure("test_config_is_a_frozen_dataclass", with_config(Changeable))
    assert "lets options be changed" in found


def test_option_without_help(failure: Check) -> None:
    @dataclass(frozen=True)
    class Inner:
        depth: int = 1

    @dataclass(frozen=True)
    class Silent(GoodConfig):
        often: int = 3
        inner: Inner = field(default=Inner(), metadata=option("Nested."))

    Silent.__annotations__["inner"] = Inner
    found = failure("test_every_option_has_help", with_config(Silent))
    assert "Silent.often" in found
    assert "Inner.depth" in found
    assert "Silent.strength" not in found
    assert "option(" in found


def test_config_that_swallows_unknown_options(failure: Check) -> None:
    @dataclass(frozen=True, init=False)
    class Swallowing(GoodConfig):
        def __init__(self, **options: Any) -> None:
            super().__init__(strength=options.get("strength", 0.01))

    found = failure("test_unknown_options_are_refused", with_config(Swallowing))
    assert "Swallowing(strengthx=...) is taken without a word" in found


@dataclass(frozen=True)
class LiveConfig(GoodConfig):
    rule: Any = field(default=abs, metadata=option("A function that is not marked as one."))


class Live(Good):
    config_class = LiveConfig

    @hookimpl
    def on_step_begin(self) -> None:
        if self.config.rule != abs:
            self.count += 1


def test_live_object_that_is_no_runtime_option(failure: Check) -> None:
    found = failure("test_recipe_gives_the_same_plugin", Live)
    assert "trains otherwise than with the same config in Python" in found


def test_whole_number_for_an_option_of_type_float(failure: Check) -> None:
    @dataclass(frozen=True)
    class Nested:
        factors: tuple[float, ...] = field(default=(1, 2), metadata=option("Factors."))

    @dataclass(frozen=True)
    class Whole(GoodConfig):
        inner: Nested = field(default=Nested(), metadata=option("Nested."))

    Whole.__annotations__["inner"] = Nested
    found = failure(
        "test_recipe_gives_the_same_plugin", with_config(Whole), config=lambda: Whole(strength=1)
    )
    assert found == ""


def test_option_that_a_recipe_cannot_give(failure: Check) -> None:
    @dataclass(frozen=True)
    class Tensors(GoodConfig):
        start: torch.Tensor = field(default=None, metadata=option("A tensor."))

    found = failure(
        "test_recipe_gives_the_same_plugin",
        with_config(Tensors),
        config=lambda: Tensors(start=torch.ones(2)),
    )
    assert "cannot be read back from a recipe" in found
    assert "runtime=True" in found


# Training -------------------------------------------------------------------------------------


def test_plugin_that_keeps_the_model_from_training(failure: Check) -> None:
    class Clearing(Good):
        @hookimpl
        def on_before_optimizer_step(self, context: Any) -> None:
            context.model.zero_grad()

    assert "no parameter of the model changed" in failure("test_trains", Clearing)


def test_plugin_that_draws_random_numbers_at_prepare(failure: Check) -> None:
    class Drawing(Good):
        @hookimpl
        def validate_composition(self) -> None:
            torch.rand(1)

    found = failure("test_prepare_draws_no_random_numbers", Drawing)
    assert "random state.torch" in found
    assert "torch.Generator" in found


def test_plugin_that_never_trains_twice_alike(failure: Check) -> None:
    class Counting(Good):
        trainings = itertools.count(1)

        @hookimpl
        def on_train_begin(self) -> None:
            self.count = next(self.trainings)

    found = failure("test_two_trainings_are_equal_bit_for_bit", Counting)
    assert "state kept on the class" in found
    assert "state.losses[0]" in found


def test_plugin_that_relies_on_its_place(failure: Check) -> None:
    class Placed(Good):
        @hookimpl
        def validate_composition(self, plugins: Any) -> None:
            self.count = plugins.index(self)

    found = failure("test_order_makes_no_difference", Placed)
    assert "listed before this one" in found


def test_plugin_that_needs_an_optional_hook_and_does_not_say_so(failure: Check) -> None:
    class NeedsEpochs(Good):
        @hookimpl
        def on_epoch_begin(self) -> None:
            self.first = True

        @hookimpl
        def on_step_begin(self) -> None:
            self.first = not self.first

    found = failure("test_optional_hooks_can_be_left_out", NeedsEpochs)
    assert "required_hooks()" in found
    assert "has no attribute 'first'" in found

    class SaysSo(NeedsEpochs):
        def required_hooks(self) -> frozenset[str]:
            return frozenset({"on_epoch_begin"})

    assert failure("test_optional_hooks_can_be_left_out", SaysSo) == ""


def test_plugin_that_expects_one_loss_for_each_update(failure: Check) -> None:
    class OneLoss(Good):
        @hookimpl
        def on_before_optimizer_step(self, context: Any) -> None:
            assert self.count == context.global_step + 1

    assert "several losses" in failure("test_optional_hooks_can_be_left_out", OneLoss)


# Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["test_resumes_in_mid_epoch", "test_resumes_at_an_epochs_end"])
def test_plugin_that_forgets_its_state(failure: Check, test: str) -> None:
    class Forgetting(Good):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            pass

    found = failure(test, Forgetting)
    assert "the losses[0]" in found
    assert "load_state_dict" in found


@pytest.mark.parametrize("test", ["test_resumes_in_mid_epoch", "test_resumes_at_an_epochs_end"])
def test_plugin_that_publishes_something_else_after_resuming(failure: Check, test: str) -> None:
    class Publishing(Good):
        seen = 0

        @hookimpl
        def on_step_end(self, context: Any) -> None:
            self.seen += 1
            context.metrics.scalar("tested/seen", self.seen)

    found = failure(test, Publishing)
    assert "publishes other metrics" in found


def test_plugin_whose_state_cannot_be_stored(failure: Check) -> None:
    class Unstorable(Good):
        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count, "seen": {1, 2}}

    found = failure("test_resumes_in_mid_epoch", Unstorable)
    assert "the state cannot be written to disk" in found


def test_plugin_that_saves_the_models_tensors(failure: Check) -> None:
    class Twice(Good):
        @hookimpl
        def on_train_begin(self, context: Any) -> None:
            self.weight = context.model.fc.weight.detach()

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count, "weight": self.weight}

    found = failure("test_state_holds_no_tensor_of_the_model", Twice)
    assert "plugin 'tested'" in found


# Failures -------------------------------------------------------------------------------------


def test_plugin_that_undoes_too_late(failure: Check) -> None:
    class Late(Good):
        @hookimpl
        def prepare_model(self, context: Any) -> None:
            context.model.fc.watched = True

        @hookimpl
        def on_train_begin(self, context: Any) -> None:
            context.add_cleanup(lambda: delattr(context.model.fc, "watched"), owner=self.name)

    assert failure("test_close_leaves_no_trace", Late, "training") == ""
    found = failure("test_failure_in_every_hook", Late)
    assert "'on_train_begin' raises before its work" in found
    assert "attribute 'watched' of module 'fc' is new" in found


def test_plugin_whose_cleanup_needs_a_whole_training(failure: Check) -> None:
    class Fragile(Good):
        @hookimpl
        def prepare_model(self, context: Any) -> None:
            context.add_cleanup(lambda: self.file.close(), owner=self.name)

        @hookimpl
        def on_train_begin(self) -> None:
            self.file = open(os.devnull)  # noqa: SIM115

    found = failure("test_failure_in_every_hook", Fragile)
    assert "closing fails" in found
    assert "has no attribute 'file'" in found


def test_plugin_that_hides_what_its_own_service_raises(failure: Check) -> None:
    class Hiding(Good):
        @hookimpl
        def make_distillation_loss(self, name: str) -> Any:
            return None

        @hookimpl
        def on_train_begin(self, context: Any) -> None:
            try:
                context.services.make_distillation_loss("own", {})
            except Exception as error:
                raise ValueError("no loss") from error

    found = failure("test_failure_in_every_hook", Hiding)
    assert "does not name plugin 'tested' and that hook" in found


def test_hook_that_is_never_reached(failure: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopping(Good):
        @hookimpl
        def on_exception(self) -> None:
            pass

    monkeypatch.setattr(
        "compression_manager.training.loops.announce_exception", lambda *arguments: []
    )
    found = failure("test_failure_in_every_hook", Stopping)
    assert "do not reach the hook 'on_exception'" in found


# Leaving --------------------------------------------------------------------------------------


def leaving(change: Callable[[Any], object]) -> type[Plugin[Any]]:
    """A plugin that changes something at prepare and leaves it so."""

    class Leaving(Good):
        @hookimpl
        def prepare_model(self, context: Any) -> None:
            change(context)

    return Leaving


class OtherLinear(nn.Linear):
    pass


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "forward hook": (
        lambda c: c.model.fc.register_forward_hook(lambda *a: None),
        "attribute '_forward_hooks' of module 'fc'",
    ),
    "backward hook": (
        lambda c: c.model.fc.register_full_backward_hook(lambda *a: None),
        "attribute '_backward_hooks' of module 'fc'",
    ),
    "hook of a parameter": (
        lambda c: c.model.fc.weight.register_hook(lambda g: None),
        "_backward_hooks of parameter 'fc.weight'",
    ),
    "class": (
        lambda c: setattr(c.model.fc, "__class__", OtherLinear),
        "class of module 'fc' was Linear and is OtherLinear",
    ),
    "attribute": (lambda c: setattr(c.model, "own", 1), "attribute 'own' of the model is new: 1"),
    "value of an attribute": (
        lambda c: setattr(c.model.bn1, "momentum", 0.5),
        "attribute 'momentum' of module 'bn1' was 0.1 and is 0.5",
    ),
    "forward of an instance": (
        lambda c: setattr(c.model.fc, "forward", c.model.fc.forward),
        "attribute 'forward' of module 'fc' is new",
    ),
    "parameter": (
        lambda c: c.model.fc.register_parameter("scale", nn.Parameter(torch.ones(()))),
        "parameter 'fc.scale' is new",
    ),
    "identity of a parameter": (
        lambda c: setattr(c.model.fc, "weight", nn.Parameter(c.model.fc.weight.detach().clone())),
        "parameter 'fc.weight' was",
    ),
    "buffer": (
        lambda c: c.model.fc.register_buffer("mask", torch.ones(2)),
        "buffers of module 'fc'",
    ),
    "module": (lambda c: c.model.add_module("extra", nn.ReLU()), "children of the model"),
    "requires_grad": (
        lambda c: c.model.fc.bias.requires_grad_(False),
        "requires_grad of parameter 'fc.bias' was True and is False",
    ),
    "mode": (lambda c: c.model.bn1.eval(), "attribute 'training' of module 'bn1'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_plugin_that_leaves_a_change_of_the_model(failure: Check, change: str) -> None:
    apply, expected = CHANGES[change]
    found = failure("test_close_leaves_no_trace", leaving(apply), "prepare")
    assert "close() after prepare leaves traces" in found
    assert expected in found
    assert "context.add_cleanup" in found


@pytest.mark.parametrize("moment", ["training", "conversion", "an exception in the loop"])
def test_plugin_that_leaves_a_parameter_group(failure: Check, moment: str) -> None:
    class Grouping(Good):
        @hookimpl
        def on_train_begin(self, context: Any) -> None:
            extra = nn.Parameter(torch.ones(()))
            context.tracked["optimizer"].add_param_group({"params": [extra]})

    found = failure("test_close_leaves_no_trace", Grouping, moment)
    assert f"close() after {moment} leaves traces" in found
    assert "number of parameter groups was 1 and is 2" in found


def test_plugin_that_leaves_state_and_hooks_in_the_optimizer(failure: Check) -> None:
    class Stateful(Good):
        @hookimpl
        def on_train_begin(self, context: Any) -> None:
            optimizer = context.tracked["optimizer"]
            optimizer.state[nn.Parameter(torch.ones(()))] = {}
            optimizer.register_step_post_hook(lambda *arguments: None)

    found = failure("test_close_leaves_no_trace", Stateful, "training")
    assert "parameters with state that are in no group was 0 and is 1" in found
    assert "'_optimizer_step_post_hooks' of the optimizer" in found


def test_plugin_that_patches_a_class(failure: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(context: Any) -> None:
        forward = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x))

    found = failure("test_close_leaves_no_trace", leaving(patch), "prepare")
    assert "method Linear.forward" in found


def test_plugin_that_leaves_a_teacher_frozen(failure: Check) -> None:
    @dataclass(frozen=True)
    class TeacherConfig(GoodConfig):
        teacher: nn.Module | None = field(default=None, metadata=option("Frozen.", runtime=True))

    class Freezing(Good):
        config_class = TeacherConfig

        @hookimpl
        def prepare_model(self) -> None:
            self.config.teacher.requires_grad_(False)

    found = failure(
        "test_close_leaves_no_trace",
        Freezing,
        "prepare",
        config=lambda: TeacherConfig(teacher=nn.Linear(2, 2)),
    )
    assert "teacher of TeacherConfig: requires_grad of parameter 'weight'" in found


def test_plugin_whose_work_shows_in_the_output_only(failure: Check) -> None:
    """A trace that no list names shows in what the model computes."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 4)
            self.register_buffer("factor", torch.ones(1), persistent=False)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.fc(input.flatten(1)) * self.factor

    found = failure(
        "test_close_leaves_no_trace",
        leaving(lambda context: context.model.factor.mul_(2)),
        "prepare",
        model=Scaled,
    )
    assert "the model computes otherwise than a new one with the same state_dict" in found


ENDED = threading.Event()
OPENED: list[int] = []
COUNT = itertools.count()
PROCESS_CHANGES: dict[str, tuple[Callable[[], object], str]] = {
    "thread": (
        lambda: threading.Thread(target=ENDED.wait, daemon=True, name="leaked").start(),
        "threads was",
    ),
    "file": (lambda: OPENED.append(os.open(os.devnull, os.O_RDONLY)), "open files was"),
    "environment": (
        lambda: os.environ.__setitem__("LEAKED", str(next(COUNT))),
        "environment variable LEAKED is new",
    ),
    "dtype": (
        lambda: torch.set_default_dtype(torch.bfloat16),
        "torch's default dtype was torch.float32 and is torch.bfloat16",
    ),
}


@pytest.mark.parametrize("change", PROCESS_CHANGES)
def test_plugin_that_changes_the_process(failure: Check, change: str) -> None:
    apply, expected = PROCESS_CHANGES[change]

    class Changing(Good):
        @hookimpl
        def prepare_model(self, context: Any) -> None:
            context.add_cleanup(apply, owner=self.name)

    try:
        found = failure("test_close_leaves_the_process_as_it_was", Changing)
    finally:
        ENDED.set()
        while OPENED:
            os.close(OPENED.pop())
        os.environ.pop("LEAKED", None)
        torch.set_default_dtype(torch.float32)
    assert expected in found
    assert "close files, end threads" in found


def test_plugin_that_draws_random_numbers_at_close(failure: Check) -> None:
    class Drawing(Good):
        @hookimpl
        def prepare_model(self, context: Any) -> None:
            context.add_cleanup(random.random, owner=self.name)

    found = failure("test_close_leaves_the_process_as_it_was", Drawing)
    assert "close() moved the global random generators" in found


# Conversion -----------------------------------------------------------------------------------


class Doubling(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


def test_plugin_that_leaves_a_module_in_the_converted_model(failure: Check) -> None:
    class Wrapping(Good):
        @hookimpl
        def prepare_model(self, context: Any) -> None:
            context.model.dropout.add_module("extra", Doubling())
            context.add_cleanup(lambda: delattr(context.model.dropout, "extra"), owner=self.name)

    found = failure("test_converted_model_has_no_trace", Wrapping)
    assert "module 'dropout.extra' (Doubling)" in found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda model: setattr(model, "own", 1), "attribute 'own'"),
        (lambda model: model.dropout.register_buffer("seen", torch.ones(1)), "tensor 'seen'"),
    ],
)
def test_plugin_that_marks_the_converted_model(
    failure: Check, change: Callable[[Any], object], expected: str
) -> None:
    class Marking(Good):
        @hookimpl(trylast=True)
        def convert_model(self, conversion: Any) -> None:
            change(conversion.model)

    assert expected in failure("test_converted_model_has_no_trace", Marking)


def test_plugin_that_changes_the_trained_model_while_converting(failure: Check) -> None:
    class Counting(Good):
        @hookimpl
        def convert_model(self, context: Any) -> None:
            context.model.bn1.num_batches_tracked.add_(1)

    found = failure("test_converted_model_has_no_trace", Counting)
    assert "convert() changed the training" in found
    assert "state.model.bn1.num_batches_tracked: 1 of 1 elements differ" in found


def test_plugin_that_leaves_the_converted_model_in_training_mode(failure: Check) -> None:
    class Training(Good):
        @hookimpl
        def convert_model(self, conversion: Any) -> None:
            conversion.model.dropout.train()

    assert "eval mode" in failure("test_converted_model_has_no_trace", Training)


def test_plugin_that_keeps_the_model_from_being_converted(failure: Check) -> None:
    class Locked(Good):
        @hookimpl
        def prepare_model(self, context: Any) -> None:
            context.model.lock = threading.Lock()

    assert "cannot be converted" in failure("test_converted_model_has_no_trace", Locked)


def test_plugin_whose_converted_model_leans_on_the_trained_one(failure: Check) -> None:
    class Leaning(Good):
        @hookimpl(trylast=True)
        def convert_model(self, context: Any, conversion: Any) -> None:
            conversion.model.fc.bias = context.model.fc.bias.detach()

        @hookimpl
        def prepare_model(self, context: Any) -> None:
            context.add_cleanup(lambda: context.model.fc.bias.data.add_(1), owner=self.name)

    found = failure("test_converted_model_lives_alone", Leaning)
    assert "computes otherwise once the manager is closed" in found


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((1.0, 1.00001), "with the loaded state_dict of another computes otherwise"),
        ((1.00001, 1.00001), "the model that deploy.load read computes otherwise"),
    ],
)
def test_plugin_whose_work_is_not_in_the_converted_models_state(
    failure: Check,
    factors: tuple[float, float],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The parity of integers would find the factor by itself.
    monkeypatch.setattr(conversion, "_quantizer_config", lambda: QATConfig(forward="fake"))

    class Scaling(Good):
        def __init__(self, config: GoodConfig) -> None:
            super().__init__(config)
            self.factors = list(factors)

        @hookimpl(trylast=True)
        def convert_model(self, conversion: Any) -> None:
            factor = self.factors.pop(0)
            conversion.model.fc.register_forward_hook(lambda m, a, output: output * factor)

    assert expected in failure("test_converted_model_lives_alone", Scaling)


# The class itself -----------------------------------------------------------------------------


def test_make_config_must_be_overridden() -> None:
    with pytest.raises(NotImplementedError, match=r"must override make_config"):
        PluginContract().make_config()


def test_plugin_that_is_not_installed_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Contract(PluginContract):
        def make_config(self) -> PluginConfig:
            return GoodConfig()

    contract = Contract()
    contract._set_up(tmp_path, monkeypatch)
    with pytest.raises(Exception, match="no plugin named 'tested' is installed"):
        contract.test_trains()
