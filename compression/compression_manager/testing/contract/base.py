"""What a contract's author may say about the plugin, and the runs that the tests are made of."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from compression_manager.manager import CompressionManager
from compression_manager.plugin import Plugin, PluginConfig
from compression_manager.plugin_host.composition import PluginSpec
from compression_manager.plugin_host.discovery import load_plugin_class
from compression_manager.prepare import prepare_compression
from compression_manager.state import (
    capture_random_state,
    restore_random_state,
    seed_everything,
)
from compression_manager.testing import installing, loops
from compression_manager.testing.data import images, loader
from compression_manager.testing.models import tiny_convolution_network
from compression_manager.testing.recording import RecordingPlugin

EPOCHS = 2
SEED = 0


@dataclass
class Parts:
    """The objects of one process before `prepare_compression`; two of them share nothing."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterable[Any]
    config: PluginConfig
    companions: tuple[PluginConfig, ...]

    @property
    def configs(self) -> list[PluginConfig]:
        """The plugin's config and those of its companions."""
        return [self.config, *self.companions]


@dataclass
class Run:
    """A manager with its training."""

    parts: Parts
    manager: CompressionManager
    contract: ContractRuns
    recording: RecordingPlugin | None = None
    losses: list[float] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        """The model, shaped in place."""
        return self.manager.model

    def train(self, epochs: int = EPOCHS, **options: Any) -> Run:
        """Train with `epochs` and `steps`."""
        self._train(loops.train, epochs, **options)
        return self

    def train_with_hooks(self, epochs: int = EPOCHS, **options: Any) -> Run:
        """Train with one call for each hook."""
        self._train(loops.train_with_hooks, epochs, **options)
        return self

    def state(self) -> dict[str, Any]:
        """Return a copy of all that a checkpoint holds, the configuration left out."""
        state = copy.deepcopy(self.manager.state_dict())
        del state["recipe"]
        return state

    def result(self) -> dict[str, Any]:
        """Return what training led to."""
        return {"losses": self.losses, **self.state()}

    def _train(self, loop: Any, epochs: int, **options: Any) -> None:
        parts = self.parts
        arguments = {"loss_arguments": self.contract.loss_arguments, **options}
        self.losses = loop(self.manager, parts.batches, parts.optimizer, epochs, **arguments)


class ContractRuns:
    """What authors may override, and how the tests run a training."""

    plugin_class: ClassVar[type[Plugin[Any]] | None] = None
    folder: Path

    # For authors ---------------------------------------------------------------------------------

    def make_config(self) -> PluginConfig:
        """Return the config of the plugin under test; the only method that must be overridden."""
        # Not abstract, because pytest would then stop at a TypeError that says nothing of this.
        raise NotImplementedError(
            f"{type(self).__name__} must override make_config(self) to return the plugin's config."
        )

    def make_companions(self) -> Sequence[PluginConfig]:
        """Return configs of plugins that must be listed behind it; by default none."""
        return ()

    def make_model(self) -> nn.Module:
        """Return a model that the plugin can work on; by default convolutions with BatchNorm."""
        return tiny_convolution_network(dropout=0.2)

    def make_batches(self) -> Iterable[Any]:
        """Return at least three batches `(inputs, targets)` for the model, with class numbers.

        They are gone through once an epoch; a shuffling data loader is a good choice.
        """
        return loader(images(24))

    def loss_arguments(self, batch: Any) -> Mapping[str, Any]:
        """Return what the loop passes to `on_after_compute_loss` by keyword; by default nothing.

        A plugin that needs labels: `return {"target": batch[1]}`.
        """
        return {}

    # For the tests -------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _begin(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Give each test folders of its own, and leave the random state as it was."""
        before = capture_random_state()
        self._set_up(tmp_path, monkeypatch)
        yield
        restore_random_state(before)

    def _set_up(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = self.folder = folder
        if self.plugin_class is not None:
            installing.install_plugin(monkeypatch, self.plugin_class)

    def _build(self, name: str) -> Parts:
        """Return new objects, equal for each call with the same `name` of the run's folder."""
        self.folder = self._root / name
        self.folder.mkdir(exist_ok=True)
        seed_everything(SEED)
        model = self.make_model()
        config = self.make_config()
        companions = tuple(self.make_companions())
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return Parts(model, optimizer, self.make_batches(), config, companions)

    def _prepare(
        self, parts: Parts, plugins: Sequence[PluginSpec] | Path | None = None, **options: Any
    ) -> Run:
        listed = parts.configs if plugins is None else plugins
        manager = prepare_compression(parts.model, listed, **options)
        manager.track(optimizer=parts.optimizer, dataloader=parts.batches)
        return Run(parts, manager, self)

    def _start(self, name: str = "run", *, recorded: bool = False) -> Run:
        parts = self._build(name)
        if not recorded:
            return self._prepare(parts)
        recording = RecordingPlugin()
        run = self._prepare(parts, [*parts.configs, recording])
        run.recording = recording
        return run

    def _plugin_class(self, config: PluginConfig) -> type[Plugin[Any]]:
        return load_plugin_class(config.plugin)


def require(condition: object, message: str) -> None:
    """Fail the test with `message` unless `condition` holds."""
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(message)


def require_none(found: Sequence[str], message: str) -> None:
    """Fail the test with `message` and what was found, unless nothing was."""
    __tracebackhide__ = True
    shown = [*found[:8], *([f"... and {len(found) - 8} more"] if len(found) > 8 else [])]
    require(not found, "\n  ".join([message, *shown]))
