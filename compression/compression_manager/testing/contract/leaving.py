"""Leaving: after `close` nothing is left of the plugin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from compression_manager.errors import ConfigError
from compression_manager.models.calling import call_model, quiet_evaluation
from compression_manager.state import capture_random_state
from compression_manager.testing.comparison import differences
from compression_manager.testing.contract.base import ContractRuns, Parts, Run, require_none
from compression_manager.testing.failing import InjectedError, fail
from compression_manager.testing.traces import (
    Traces,
    changes,
    model_traces,
    optimizer_traces,
    resource_traces,
    setting_traces,
)

_MOMENTS = ("prepare", "training", "conversion", "an exception in the loop")


@dataclass
class Before:
    """How the objects of a run were before the plugin came."""

    parts: Parts
    models: Mapping[str, tuple[nn.Module, Traces]]
    optimizer: Traces

    @classmethod
    def of(cls, parts: Parts) -> Before:
        """Look at the model, the optimizer and the modules that configs hold."""
        models = {"": parts.model, **_modules(parts)}
        seen = {name: (model, model_traces(model)) for name, model in models.items()}
        return cls(parts, seen, optimizer_traces(parts.optimizer))

    def changes(self) -> list[str]:
        """Return what is otherwise now."""
        found = [
            f"{name}{line}"
            for name, (model, traces) in self.models.items()
            for line in changes(traces, model_traces(model))
        ]
        return found + changes(self.optimizer, optimizer_traces(self.parts.optimizer))


class LeavingContract(ContractRuns):
    """Tests of what is there after the manager closed."""

    @pytest.mark.parametrize("moment", _MOMENTS)
    def test_close_leaves_no_trace(self, moment: str) -> None:
        """All is as before: hooks, classes, attributes, parameters, modes, optimizer, output."""
        parts = self._build("run")
        before = Before.of(parts)
        run = self._prepare(parts)
        _come_to(moment, run)
        run.manager.close()
        require_none(
            before.changes(),
            f"close() after {moment} leaves traces of the plugin; undo every change of the model "
            "in a callback of context.add_cleanup, place hooks with context.model_hooks, and give "
            "new parameters to context.add_parameters:",
        )
        plain = self.make_model()
        plain.load_state_dict(run.model.state_dict())
        inputs = next(iter(self.make_batches()))[0]
        with quiet_evaluation(run.model, plain):
            output, expected = (call_model(model, inputs) for model in (run.model, plain))
        require_none(
            differences(output, expected, "output"),
            f"after close(), following {moment}, the model computes otherwise than a new one with "
            "the same state_dict; something of the plugin still takes part:",
        )

    def test_close_leaves_the_process_as_it_was(self) -> None:
        """Files are closed, threads ended, handlers and settings put back."""
        settings = setting_traces()
        # Threads and files that libraries open once for the whole process are not the plugin's.
        first = self._start("first").train()
        first.manager.close()
        resources = resource_traces()
        run = self._start("second").train()
        random_state = capture_random_state()
        run.manager.close()
        require_none(
            differences(capture_random_state(), random_state, "random state"),
            "close() moved the global random generators; draw from a torch.Generator of the "
            "plugin's own:",
        )
        require_none(
            changes(settings, setting_traces()) + changes(resources, resource_traces()),
            "training and close() leave the process otherwise than it was; close files, end "
            "threads and put settings back in a callback of context.add_cleanup:",
        )


def _come_to(moment: str, run: Run) -> None:
    if moment == "prepare":
        return
    if moment == "an exception in the loop":
        with pytest.raises(InjectedError):
            run.train(after_step=fail)
        return
    run.train()
    if moment == "conversion":
        with suppress(ConfigError):  # nothing quantizes
            run.manager.convert()


def _modules(parts: Parts) -> dict[str, nn.Module]:
    """Return the modules, such as teachers, among the live objects of the configs."""
    found: dict[str, Any] = {
        f"{item.name} of {type(config).__name__}: ": getattr(config, item.name)
        for config in parts.configs
        for item in dataclasses.fields(config)
        if item.metadata.get("runtime")
    }
    return {name: value for name, value in found.items() if isinstance(value, torch.nn.Module)}
