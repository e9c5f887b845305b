"""What plugins raise: foreign exceptions become PluginError, our own pass with a note."""

from __future__ import annotations

from typing import Any

import pytest

import toys
from compression_manager import CompressionManager, ConfigError, PluginError, prepare_compression
from compression_manager.quantization import QuantizationScheme, QuantizationSite
from compression_manager.testing import differences
from compression_manager.testing.recording import HOOKS
from probes import begin_step, call_loss, finish, probe

SITE = QuantizationSite("0", "weight")
ANNOUNCED = {"on_exception"}


def _use(manager: CompressionManager) -> None:
    begin_step(manager)
    manager._context.request_details()
    call_loss(manager)
    manager.on_before_optimizer_step()
    manager.on_after_optimizer_step()
    manager.on_step_end()
    manager.on_before_eval()
    manager.on_after_eval({})
    manager.on_epoch_end()
    manager.on_train_end()
    for ask in ("make_observer", "make_fake_quantizer"):
        getattr(manager._context.services, ask)(QuantizationScheme(), SITE)
    manager._context.services.make_distillation_loss("x", {})


def _convert(manager: CompressionManager) -> None:
    manager.convert()


def _failing(hook: str, error: BaseException) -> Any:
    def fail(self: Any) -> None:
        raise error

    members: dict[str, Any] = {hook: fail}
    if hook == "make_fake_quantizer":
        members["make_observer"] = lambda self: _observer()
    if hook == "make_distillation_loss":
        members |= {
            "make_observer": lambda self: _observer(),
            "make_fake_quantizer": lambda self: _fake_quantizer(),
        }
    return probe("culprit", **members)


def _observer() -> Any:
    from compression_manager.quantization.observers import MinMaxObserver

    return MinMaxObserver(QuantizationScheme(), SITE)


def _fake_quantizer() -> Any:
    from compression_manager.quantization import ObservedFakeQuantizer

    return ObservedFakeQuantizer(QuantizationScheme(), SITE, _observer())


def _run(hook: str, error: BaseException) -> None:
    manager = prepare_compression(toys.mlp(), [probe("innocent"), _failing(hook, error)])
    if hook == "convert_model":
        _convert(manager)
    else:
        _use(manager)


@pytest.mark.parametrize("hook", sorted(set(HOOKS) - ANNOUNCED))
def test_foreign_exception_names_plugin_and_hook_and_is_the_cause(hook: str) -> None:
    cause = KeyError("details")
    with pytest.raises(PluginError) as error:
        _run(hook, cause)
    assert (error.value.plugin, error.value.hook) == ("culprit", hook)
    assert error.value.__cause__ is cause
    for part in ("culprit", hook, "KeyError", "details"):
        assert part in str(error.value)


@pytest.mark.parametrize("hook", sorted(set(HOOKS) - ANNOUNCED))
def test_our_own_errors_pass_with_a_note(hook: str) -> None:
    own = ConfigError("own text")
    with pytest.raises(ConfigError) as error:
        _run(hook, own)
    assert error.value is own
    assert str(own) == "own text"
    assert own.__notes__ == [f"raised by plugin 'culprit' in hook '{hook}'"]


def test_keyboard_interrupt_passes_untouched() -> None:
    with pytest.raises(KeyboardInterrupt):
        _run("on_step_begin", KeyboardInterrupt())


def test_note_names_the_plugin_that_raised_not_the_one_that_asked() -> None:
    def on_step_begin(self: Any, context: Any) -> None:
        context.services.make_distillation_loss("x", {})

    def answer(self: Any) -> None:
        raise ConfigError("own text")

    plugins = [
        probe("asks", on_step_begin=on_step_begin),
        probe("b", make_distillation_loss=answer),
    ]
    with pytest.raises(ConfigError) as error:
        begin_step(prepare_compression(toys.mlp(), plugins))
    assert error.value.__notes__ == ["raised by plugin 'b' in hook 'make_distillation_loss'"]


@pytest.mark.parametrize("method", ["state_dict", "required_hooks"])
def test_methods_besides_hooks_are_named_as_well(method: str) -> None:
    def fail(self: Any) -> Any:
        raise OSError("gone")

    with pytest.raises(PluginError, match=r"'culprit' failed in hook.*OSError: gone") as error:
        prepare_compression(toys.mlp(), [probe("culprit", **{method: fail})]).state_dict()
    assert (error.value.plugin, error.value.hook) == ("culprit", method)


def test_failing_start_can_be_repeated_after_resume() -> None:
    source = begin_step(prepare_compression(toys.mlp(), [probe()]))
    call_loss(source).backward()
    finish(source)
    state = source.state_dict()
    started: list[int] = []

    def on_train_begin(self: Any, context: Any) -> None:
        started.append(1)
        if len(started) == 1:
            raise ConfigError("resume first")

    manager = prepare_compression(toys.mlp(), [probe(on_train_begin=on_train_begin)])
    with pytest.raises(ConfigError):
        manager.on_train_begin()
    manager.load_state_dict(state)
    del started[:]
    with pytest.raises(ConfigError):
        manager.on_train_begin()
    # The gradients that wait for an update are still known to wait.
    assert differences(manager.state_dict(), state) == []
    manager.on_train_begin()
    manager.on_epoch_begin(manager.position.epoch)
    manager.on_step_begin(0)
    call_loss(manager)
    finish(manager)
