"""Closing: every cleanup runs, whatever raises; the float model comes back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

import toys
from compression_manager import (
    CompressionError,
    CompressionManager,
    ConfigError,
    LifecycleError,
    PluginError,
    prepare_compression,
)
from compression_manager.testing import Event, RecordingConfig, RecordingPlugin
from compression_plugins import DistillationConfig, QATConfig
from probes import begin_step, call_loss, finish, probe


def _with_cleanups(log: list[str], **failing: BaseException) -> list[Any]:
    def plugin(name: str) -> Any:
        def cleanup() -> None:
            log.append(name)
            if name in failing:
                raise failing[name]

        def prepare_model(self: Any, context: Any) -> None:
            context.add_cleanup(cleanup, owner=name)

        return probe(name, prepare_model=prepare_model)

    return [plugin(name) for name in ("a", "b", "c")]


def test_last_added_runs_first_and_only_once() -> None:
    log: list[str] = []
    manager = prepare_compression(toys.mlp(), _with_cleanups(log))
    manager.close()
    manager.close()
    with manager:
        pass
    assert log == ["c", "b", "a"]


def test_one_failure_is_named_and_the_others_still_run() -> None:
    log: list[str] = []
    cause = OSError("disk")
    manager = prepare_compression(toys.mlp(), _with_cleanups(log, b=cause))
    with pytest.raises(PluginError, match="'b' failed while closing: disk") as error:
        manager.close()
    assert (error.value.plugin, error.value.hook) == ("b", "close")
    assert error.value.__cause__ is cause
    assert log == ["c", "b", "a"]
    manager.close()


def test_several_failures_are_raised_together() -> None:
    log: list[str] = []
    failing = {"a": OSError("1"), "c": OSError("3")}
    manager = prepare_compression(toys.mlp(), _with_cleanups(log, **failing))
    with pytest.raises(CompressionError) as error:
        manager.close()
    assert isinstance(error.value, ExceptionGroup)
    assert [failure.plugin for failure in error.value.exceptions] == ["c", "a"]
    assert log == ["c", "b", "a"]


def test_an_interrupt_does_not_leave_the_model_half_restored() -> None:
    log: list[str] = []
    failing = {"a": OSError("disk"), "b": KeyboardInterrupt(), "c": SystemExit(3)}
    manager = prepare_compression(toys.mlp(), _with_cleanups(log, **failing))
    with pytest.raises(KeyboardInterrupt) as error:
        manager.close()
    assert error.value is failing["b"]
    assert error.value.__notes__ == ["while closing: plugin 'a' failed while closing: disk"]
    assert log == ["c", "b", "a"]
    manager.close()


def test_an_interrupt_in_on_exception_closes_all_the_same() -> None:
    log: list[str] = []

    def on_exception(self: Any) -> None:
        raise KeyboardInterrupt

    plugins = [*_with_cleanups(log), probe("x", on_exception=on_exception)]
    with pytest.raises(KeyboardInterrupt) as error, prepare_compression(toys.mlp(), plugins):
        raise KeyError("body")
    assert isinstance(error.value.__context__, KeyError)
    assert log == ["c", "b", "a"]


def test_failures_do_not_hide_what_the_body_raised() -> None:
    log: list[str] = []
    failing = {"a": OSError("1"), "c": OSError("3")}
    raising = probe("x", on_exception=lambda self: 1 / 0)
    plugins = [*_with_cleanups(log, **failing), raising]
    with pytest.raises(KeyError) as error, prepare_compression(toys.mlp(), plugins):
        raise KeyError("body")
    assert log == ["c", "b", "a"]
    notes = " ".join(error.value.__notes__)
    assert "plugin 'x' failed in hook 'on_exception'" in notes
    assert "several plugins failed" in notes


def test_every_plugin_is_told_about_the_exception_even_if_one_fails() -> None:
    log: list[Event] = []

    def recording(name: str) -> RecordingPlugin:
        return RecordingPlugin(RecordingConfig(name=name), log)

    failing = probe("fails", on_exception=lambda self: 1 / 0)
    plugins = [recording("a"), failing, recording("b")]
    with pytest.raises(KeyboardInterrupt), prepare_compression(toys.mlp(), plugins):
        raise KeyboardInterrupt
    assert [event.plugin for event in log if event.hook == "on_exception"] == ["a", "b"]


def test_failures_after_a_loop_that_raised_come_at_the_next_call() -> None:
    manager = prepare_compression(toys.mlp(), _with_cleanups([], a=OSError("disk")))

    def train() -> None:
        for _ in manager.epochs(1):
            raise KeyError("body")

    with pytest.raises(KeyError):
        train()
    with pytest.raises(PluginError, match="disk"):
        manager.close()
    manager.close()


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _trained(model: torch.nn.Module) -> CompressionManager:
    configs = [DistillationConfig(toys.ConvNet(8)), QATConfig()]
    manager = prepare_compression(model, configs)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    manager.track(optimizer=optimizer)
    toys.train(manager, toys.loader(toys.images(16)), optimizer, 2)
    return manager


def test_close_gives_the_float_model_back() -> None:
    torch.manual_seed(0)
    model = toys.ConvNet()
    reference = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    classes = [type(module) for module in model.modules()]
    kept = model.conv1.register_forward_hook(lambda *args: None)
    manager = _trained(model)
    model.train()
    manager.close()
    assert [type(module) for module in model.modules()] == classes
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert _hooks(model) == 1
    kept.remove()
    reference.load_state_dict(model.state_dict())
    reference.eval()
    model.eval()
    inputs = torch.randn(4, 1, 8, 8)
    assert torch.equal(model(inputs), reference(inputs))


def test_closed_manager_does_not_convert_but_saves_what_was_converted(tmp_path: Any) -> None:
    manager = _trained(toys.ConvNet())
    manager.convert()
    manager.close()
    manager.save_converted(tmp_path / "int8")
    assert (tmp_path / "int8").is_dir()
    with pytest.raises(LifecycleError, match="convert was called on a closed manager"):
        manager.convert()
    other = _trained(toys.ConvNet())
    other.close()
    with pytest.raises(LifecycleError, match="convert was called on a closed manager"):
        other.save_converted(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_copy_of_a_prepared_model_has_no_working_hooks() -> None:
    seen: list[Any] = []

    def prepare_model(self: Any, context: Any) -> None:
        hooks = context.model_hooks
        hooks.add_forward_hook(context.model, lambda *args: seen.append("after"))
        hooks.add_forward_pre_hook(
            context.model[0], lambda *args: seen.append("before"), with_kwargs=True
        )

    manager = prepare_compression(toys.mlp(), [probe(prepare_model=prepare_model)])
    inputs = torch.randn(2, 6)
    expected = manager.model(inputs)
    assert seen == ["before", "after"]
    copied = copy.deepcopy(manager.model)
    assert torch.equal(copied(inputs), expected)
    assert seen == ["before", "after"]
    manager.close()
    manager.model(inputs)
    assert seen == ["before", "after"]


def test_copied_and_pickled_hooks_do_not_drag_the_plugin_along() -> None:
    calls: list[Any] = []

    class Heavy:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

        def __getstate__(self) -> Any:
            raise AssertionError("pickled")

        def hook(self, *args: Any) -> None:
            calls.append(args)

    def prepare_model(self: Any, context: Any) -> None:
        context.model_hooks.add_forward_hook(context.model, Heavy().hook)

    model = prepare_compression(toys.mlp(), [probe(prepare_model=prepare_model)]).model
    inputs = toys.vectors().tensors[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(inputs), model(inputs))
    assert len(calls) == 2


def test_a_layer_that_was_parametrized_after_preparing_is_given_back_so() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    manager = prepare_compression(model, [QATConfig()])
    parametrizations.weight_norm(model[0])
    inputs = toys.vectors().tensors[0]
    expected = model(inputs)
    manager.close()
    assert isinstance(model[0], torch.nn.Linear)
    assert type(model[0]).__name__ == "ParametrizedLinear"
    assert torch.equal(model(inputs), expected)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is torch.nn.Linear
    torch.testing.assert_close(model(inputs), expected)


def test_training_can_be_repeated_before_closing() -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    for _ in range(2):
        begin_step(manager)
        call_loss(manager)
        finish(manager)
    manager.close()
    with pytest.raises(LifecycleError):
        manager.on_train_begin()


def test_failing_validation_closes_nothing_twice() -> None:
    log: list[str] = []

    def refuse(self: Any) -> None:
        raise ConfigError("no")

    plugins = [*_with_cleanups(log), probe("x", prepare_model=refuse)]
    with pytest.raises(ConfigError, match="no"):
        prepare_compression(toys.mlp(), plugins)
    assert log == ["c", "b", "a"]


@pytest.mark.parametrize("nested", [False, True])
def test_the_error_says_what_closed_a_manager(nested: bool) -> None:
    manager = prepare_compression(toys.mlp(), [probe()])

    def interrupted() -> None:
        for _ in manager.epochs(2):
            for _ in manager.steps([1]) if nested else ():
                raise KeyboardInterrupt
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    message = "convert was called on a manager that an exception in its loop has closed"
    with pytest.raises(LifecycleError, match=message):
        manager.convert()
