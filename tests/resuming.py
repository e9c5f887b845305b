"""Trainings that can be saved anywhere and resumed, for tests of bit-identity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, RandomSampler

import toys
from compression_manager import CompressionManager, prepare_compression
from compression_plugins import QATConfig

EPOCHS, STEPS = 3, 4


@dataclass(frozen=True)
class Setup:
    """What a training consists of."""

    optimizer: str = "sgd"
    own_generator: str | None = None
    accumulate: int = 1
    after: bool = True
    set_to_none: bool = True
    track_loader: bool = False
    draw_between_epochs: bool = True


@dataclass
class Training:
    """One process's objects; two of them share nothing."""

    setup: Setup
    manager: CompressionManager
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: DataLoader[Any]
    losses: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, setup: Setup, *, seed: int = 0, plugins: Sequence[Any] = ()) -> Training:
        torch.manual_seed(seed)
        model = toys.ConvNet(dropout=0.3)
        manager = prepare_compression(model, [QATConfig(), *plugins])
        if setup.optimizer == "sgd":
            optimizer: Any = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        loader = _loader(setup.own_generator, seed)
        tracked = {"dataloader": loader} if setup.track_loader else {}
        manager.track(optimizer=optimizer, scheduler=scheduler, **tracked)
        return cls(setup, manager, optimizer, scheduler, loader)

    def begin_epoch(self) -> None:
        """Draw from all generators between two epochs."""
        self.manager.model.train()
        if self.setup.draw_between_epochs:
            torch.rand(3, generator=self.loader.generator)
            torch.rand(3)

    def body(self, count: int, inputs: Any, targets: Any) -> None:
        """The work of one step; `count` is its number over all epochs."""
        manager = self.manager
        # Draws from the generator that a loader may share with the user's own code.
        noise = torch.randn(inputs.shape, generator=self.loader.generator) * 0.01
        output = manager.model(inputs + noise)
        loss = F.cross_entropy(output, targets)
        loss = manager.on_after_compute_loss(inputs, output, loss)
        (loss / self.setup.accumulate).backward()
        self.losses.append(float(loss.detach()))
        if (count + 1) % self.setup.accumulate == 0:
            manager.on_before_optimizer_step()
            self.optimizer.step()
            if self.setup.after:
                manager.on_after_optimizer_step()
            self.optimizer.zero_grad(set_to_none=self.setup.set_to_none)
            self.scheduler.step()

    def run(self, save: Callable[[CompressionManager, int], None] | None = None) -> None:
        """Train to the end with `epochs` and `steps`; `save` is called at the end of each body."""
        for epoch in self.manager.epochs(EPOCHS):
            self.begin_epoch()
            for step, (inputs, targets) in self.manager.steps(self.loader):
                self.body(epoch * STEPS + step, inputs, targets)
                if save is not None:
                    save(self.manager, epoch * STEPS + step)
            self.manager.on_before_eval()
            self.manager.on_after_eval({"bias": self.bias()})

    def bias(self) -> float:
        """What stands for an evaluation."""
        return float(self.manager.model.fc.bias.detach().sum())

    def run_plain(self, after_epoch: Callable[[int], None] = lambda epoch: None) -> None:
        """Train to the end with hooks in a range loop."""
        manager = self.manager
        manager.on_train_begin()
        for epoch in range(manager.position.epoch, EPOCHS):
            manager.on_epoch_begin(epoch)
            self.begin_epoch()
            for step, (inputs, targets) in enumerate(self.loader):
                manager.on_step_begin(step)
                self.body(epoch * STEPS + step, inputs, targets)
                manager.on_step_end()
            manager.on_epoch_end()
            after_epoch(epoch)
        manager.on_train_end()

    def final(self) -> dict[str, Any]:
        """Everything that training changed."""
        state = copy.deepcopy(self.manager.state_dict())
        del state["loader"]["epoch_start"]
        return state


def _loader(own_generator: str | None, seed: int) -> DataLoader[Any]:
    data = toys.images(8 * STEPS)
    generator = None if own_generator is None else torch.Generator().manual_seed(seed + 5)
    if own_generator == "batch_sampler":
        sampler = RandomSampler(data, generator=generator)
        batches = torch.utils.data.BatchSampler(sampler, 8, drop_last=False)
        return DataLoader(data, batch_sampler=batches)
    return DataLoader(data, 8, shuffle=True, generator=generator)
