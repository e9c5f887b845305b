"""Resuming in mid-epoch where `steps` gets something else than the data loader itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import toys
from compression_manager import prepare_compression
from compression_manager.tracking.batch_identity import identity_of
from probes import probe

EPOCHS, STEPS = 2, 4
STOPPED = STEPS + 2
Wrap = Callable[[Any], Any]


class Prefetcher:
    """A wrapper of the user's own."""

    def __init__(self, loader: Any) -> None:
        self.source = loader

    def __iter__(self) -> Any:
        return iter(self.source)


def _batches(wrap: Wrap, state: dict[str, Any] | None = None) -> tuple[list[Tensor], list[Any]]:
    """Return the batches of a training, or of its rest, and the states within its steps."""
    torch.manual_seed(0 if state is None else 1)
    manager = prepare_compression(toys.mlp(), [probe()])
    generator = torch.Generator().manual_seed(7 if state is None else 8)
    loader: Any = DataLoader(torch.arange(4 * STEPS), 4, shuffle=True, generator=generator)
    if state is not None:
        manager.load_state_dict(state)
    batches, states = [], []
    for _ in manager.epochs(EPOCHS):
        for _, batch in manager.steps(wrap(loader)):
            manager.on_after_compute_loss(batch, None, batch.float().mean())
            batches.append(batch.clone())
            batch.zero_()  # as users normalize in place
            states.append(copy.deepcopy(manager.state_dict()))
    return batches, states


@pytest.mark.parametrize("wrap", [lambda loader: tqdm(loader, disable=True), Prefetcher])
def test_loaders_within_others_continue_with_the_next_batch(wrap: Wrap) -> None:
    expected, states = _batches(wrap)
    rest, _ = _batches(wrap, states[STOPPED - 1])
    assert len(rest) == len(expected) - STOPPED
    assert all(map(torch.equal, rest, expected[STOPPED:]))


def test_other_batches_than_those_that_were_consumed_are_told() -> None:
    def wrap(loader: Any) -> Any:
        return itertools.islice(loader, STEPS)

    _, states = _batches(wrap)
    with pytest.warns(UserWarning, match="some samples come twice.*got islice"):
        _batches(wrap, states[STOPPED - 1])


def test_checkpoints_of_before_are_taken_as_they_are() -> None:
    _, states = _batches(lambda loader: itertools.islice(loader, STEPS))
    (position,) = _positions(states[STOPPED - 1])
    del position["last_batch"]
    _batches(lambda loader: itertools.islice(loader, STEPS), states[STOPPED - 1])


def _positions(state: Any) -> list[dict[str, Any]]:
    if not isinstance(state, dict):
        return []
    own = [state] if "last_batch" in state else []
    return own + [found for value in state.values() for found in _positions(value)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_batches_are_told_apart_by_shapes_types_and_values() -> None:
    batch = {"images": torch.rand(2, 3, 8, 8), "labels": [torch.tensor([1, 2])]}
    assert identity_of(batch) == identity_of(copy.deepcopy(batch))
    others = [
        {**batch, "images": batch["images"] + 1},
        {**batch, "images": batch["images"].double()},
        {**batch, "images": batch["images"].flatten(2)},
        {**batch, "labels": [torch.tensor([1, 3])]},
        "text",
    ]
    assert len({identity_of(item) for item in (batch, *others)}) == 1 + len(others)
    unusual = (
        torch.rand(0),
        torch.rand(2).to_sparse(),
        torch.nested.nested_tensor([torch.rand(2)]),
    )
    assert identity_of(unusual) == identity_of(unusual) != identity_of(())
