"""Plugins run in the order of the user's list, in every hook."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import toys
from compression_manager import CompressionManager, Plugin, hookimpl, prepare_compression
from compression_manager.quantization import QuantizationScheme, QuantizationSite
from compression_manager.testing import RecordingPlugin
from compression_manager.testing.recording import HOOKS
from probes import begin_step, call_loss, finish, probe

SERVICES = {"make_observer", "make_fake_quantizer", "make_distillation_loss"}
SITE = QuantizationSite("0", "weight")


def _marked(log: list[Any], name: str, **marks: bool) -> Any:
    """A plugin that appends `(name, hook)` to `log` in every hook, with pluggy's marks."""

    def recording(hook: str) -> Any:
        def record(self: Any) -> None:
            log.append((name, hook))

        return hookimpl(record, **marks)

    body = {hook: recording(hook) for hook in HOOKS}
    config_class = RecordingPlugin.config_class
    return type("Marked", (Plugin,), {"config_class": config_class, **body})(
        config_class(name=name)
    )


def _use_every_hook(manager: CompressionManager) -> None:
    manager._context.request_details()
    begin_step(manager)
    call_loss(manager)
    manager.on_before_optimizer_step()
    manager.on_after_optimizer_step()
    manager.on_step_end()
    manager.on_before_eval()
    manager.on_after_eval({"accuracy": 1})
    manager.on_epoch_end()
    manager.on_train_end()
    services = manager._context.services
    for ask in (
        lambda: services.make_observer(QuantizationScheme(), SITE),
        lambda: services.make_fake_quantizer(QuantizationScheme(), SITE),
        lambda: services.make_distillation_loss("x", {}),
        lambda: manager.convert(),
    ):
        with pytest.raises(Exception, match=r"no plugin answers|nothing was converted"):
            ask()
    with pytest.raises(KeyError), manager:
        raise KeyError


@pytest.mark.parametrize("marks", [{}, {"trylast": True}, {"tryfirst": True}])
def test_every_hook_follows_the_list(marks: dict[str, bool]) -> None:
    log: list[tuple[str, str]] = []
    names = ["b", "c", "a"]
    plugins = [_marked(log, name, **marks) for name in names]
    _use_every_hook(prepare_compression(toys.mlp(), plugins))
    order: dict[str, list[str]] = {}
    for name, hook in log:
        order.setdefault(hook, []).append(name)
    assert set(order) == set(HOOKS)
    for hook, called in order.items():
        assert called == names * (len(called) // 3), hook


@pytest.mark.parametrize("names", list(itertools.permutations("abc")))
def test_trylast_comes_after_all_others(names: tuple[str, ...]) -> None:
    log: list[Any] = []
    plugins = [_marked(log, name, trylast=name == "b") for name in names]
    manager = prepare_compression(toys.mlp(), plugins)
    del log[:]
    manager.on_train_begin()
    assert [name for name, _ in log] == [*(name for name in names if name != "b"), "b"]


@pytest.mark.parametrize("names", list(itertools.permutations(["publisher", "sink", "late"])))
def test_metrics_arrive_after_the_event_whatever_the_order(names: tuple[str, ...]) -> None:
    seen: list[list[tuple[str, Any]]] = []

    def publishing(prefix: str) -> Any:
        def publish(self: Any, context: Any) -> None:
            context.metrics.scalar(f"{prefix}/x", 1.0)

        return publish

    def consume_metrics(self: Any, metrics: Any) -> None:
        seen.append([(metric.name, metric.global_step) for metric in metrics])

    parts = {
        "publisher": probe("publisher", on_step_end=publishing("publisher")),
        "late": probe("late", on_epoch_end=publishing("late"), on_train_end=publishing("late")),
        "sink": probe("sink", consume_metrics=consume_metrics),
    }
    manager = begin_step(prepare_compression(toys.mlp(), [parts[name] for name in names]))
    call_loss(manager)
    manager.on_before_optimizer_step()
    finish(manager)
    assert seen == [
        [("loss/task", 0), ("loss/total", 0), ("publisher/x", 1)],
        [("late/x", 1)],
        [("late/x", 1)],
    ]


@pytest.mark.parametrize("position", [0, 1])
def test_details_requested_in_any_hook_come_in_the_same_step(position: int) -> None:
    seen: list[str] = []

    def on_step_end(self: Any, context: Any) -> None:
        context.request_details()

    def publish_details(self: Any, context: Any) -> None:
        context.metrics.scalar("detail", 2.0)

    def consume_metrics(self: Any, metrics: Any) -> None:
        seen.extend(metric.name for metric in metrics)

    plugins = [probe("shows", publish_details=publish_details, consume_metrics=consume_metrics)]
    plugins.insert(position, probe("asks", on_step_end=on_step_end))
    manager = begin_step(prepare_compression(toys.mlp(), plugins))
    manager.on_step_end()
    assert seen == ["detail"]


def test_details_come_once_per_request() -> None:
    recording = RecordingPlugin()
    manager = begin_step(prepare_compression(toys.mlp(), [recording]))
    manager._context.request_details()
    manager.on_step_end()
    manager.on_step_begin(1)
    manager.on_step_end()
    assert recording.hooks.count("publish_details") == 1


def test_a_sink_cannot_change_what_others_see() -> None:
    kinds: list[type] = []

    def consume_metrics(self: Any, metrics: Any) -> None:
        kinds.append(type(metrics))

    manager = begin_step(prepare_compression(toys.mlp(), [probe(consume_metrics=consume_metrics)]))
    call_loss(manager)
    manager.on_step_end()
    assert kinds == [tuple]
