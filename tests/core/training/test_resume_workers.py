"""Resuming with a data loader whose worker processes draw random numbers."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import toys
from compression_manager import CompressionManager, prepare_compression
from probes import probe

# Python tells from 3.12 on that torch's threads and forked workers do not go well together.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
EPOCHS, STEPS = 2, 3


class Noisy(Dataset[Tensor]):
    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(6)


def _start(**options: Any) -> tuple[CompressionManager, DataLoader[Tensor]]:
    manager = prepare_compression(toys.mlp(), [probe()])
    return manager, DataLoader(Noisy(), 2, shuffle=True, num_workers=1, **options)


def test_workers_draw_what_they_would_have_drawn() -> None:
    torch.manual_seed(0)
    manager, loader = _start()
    batches: list[Tensor] = []
    states: list[dict[str, Any]] = []
    for _ in manager.epochs(EPOCHS):
        for _, batch in manager.steps(loader):
            manager.on_after_compute_loss(batch, None, batch.mean())
            batches.append(batch)
            states.append(copy.deepcopy(manager.state_dict()))
    for count in (1, STEPS):  # in mid-epoch, and at an epoch's last step
        resumed, loader = _start()
        torch.manual_seed(count)
        resumed.load_state_dict(states[count - 1])
        rest = [batch for _ in resumed.epochs(EPOCHS) for _, batch in resumed.steps(loader)]
        assert len(rest) == len(batches) - count
        assert all(map(torch.equal, rest, batches[count:]))


class Persistent(list[int]):
    persistent_workers = True


@pytest.mark.parametrize("plain", [False, True])
def test_workers_that_outlive_an_epoch_are_told_once(plain: bool) -> None:
    state = copy.deepcopy(_start()[0].state_dict())
    manager, loader = _start()[0], Persistent([0, 1, 2])
    manager.track(dataloader=loader)
    manager.load_state_dict(state)
    manager.on_train_begin()
    for epoch, expected in enumerate((pytest.warns, _nothing)):
        manager.on_epoch_begin(epoch)
        with expected(UserWarning, match="persistent workers keep random states"):
            if plain:
                _steps(manager)
            else:
                list(manager.steps(loader))
        manager.on_epoch_end()


def _steps(manager: CompressionManager) -> None:
    for step in range(3):
        manager.on_step_begin(step)
        manager.on_step_end()


def _nothing(*arguments: Any, **options: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()  # warnings are errors in tests
