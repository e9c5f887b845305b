"""The recording plugin receives every hook with its arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import toys
from compression_manager import hookspecs, prepare_compression
from compression_manager.testing import Event, RecordingConfig, RecordingPlugin
from compression_manager.testing.recording import HOOKS


def _signature(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_it_implements_every_hook_with_all_parameters() -> None:
    specified = {
        name: _signature(function)
        for name, function in vars(hookspecs).items()
        if hasattr(function, "compression_manager_spec")
    }
    assert {name: list(parameters) for name, parameters in HOOKS.items()} == specified
    implemented = {
        name: _signature(value)
        for name, value in vars(RecordingPlugin).items()
        if hasattr(value, "compression_manager_impl")
    }
    assert implemented == specified


def test_events_come_in_order_with_their_arguments() -> None:
    recording = RecordingPlugin()
    model = toys.mlp()
    manager = prepare_compression(model, [recording])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    toys.train(manager, toys.loader(toys.vectors(8)), optimizer, 1)
    assert recording.hooks == [
        "validate_composition",
        "prepare_model",
        "on_train_begin",
        "on_epoch_begin",
        "on_step_begin",
        "on_after_compute_loss",
        "on_before_optimizer_step",
        "on_after_optimizer_step",
        "on_step_end",
        "consume_metrics",
        "on_before_eval",
        "on_after_eval",
        "consume_metrics",
        "on_epoch_end",
        "on_train_end",
    ]
    [loss] = recording.arguments("on_after_compute_loss")
    assert loss["student_output"].shape == (8, toys.CLASSES)
    assert (loss["target"], loss["mask"]) == (None, None)
    assert [event["epoch"] for event in recording.arguments("on_epoch_begin")] == [0]
    assert all(event.plugin == "recording" for event in recording.events)
    assert all(event.arguments.keys() == set(HOOKS[event.hook]) for event in recording.events)


def test_several_can_share_one_list() -> None:
    events: list[Event] = []
    plugins = [RecordingPlugin(RecordingConfig(name=name), events) for name in ("b", "a")]
    prepare_compression(toys.mlp(), plugins)
    assert [(event.plugin, event.hook) for event in events[-2:]] == [
        ("b", "prepare_model"),
        ("a", "prepare_model"),
    ]
