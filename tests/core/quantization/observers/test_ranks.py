"""Observers on two ranks stand as one that saw the ranks' tensors concatenated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.observers import base
from observer_reference import BINNED, CALIBRATIONS, observer, scheme
from rank_runs import on_ranks, process_group

SCHEMES = {
    "tensor": scheme(4),
    "symmetric": scheme(4, True),
    "channel": scheme(4, axis=1),
}
CASES = [(kind, of) for kind in CALIBRATIONS for of in SCHEMES]
SKIPPED, WITHOUT_VALUES = 3, 1


def parts(rank: int) -> list[Tensor]:
    """A rank's share of 14 batches, of unequal length; NaN, infinity and nothing among them."""
    generator = np.random.default_rng(rank)
    batches = [
        (generator.normal(size=(5 + 3 * rank, 3)) * 2.0 ** (index % 5 - 2)).astype(np.float32)
        for index in range(14)
    ]
    if rank == 0:
        batches[2][1, 1] = np.inf
        batches[5] = batches[5][:0]
        batches[0] = batches[0][:0]
    else:
        batches[3][0, 0] = np.nan
        batches[6] = batches[6][:0]
        batches[8] = np.zeros_like(batches[8])
    batches[7] = batches[7][:0]
    batches[9][0, 2] = -np.inf
    return [torch.from_numpy(batch) for batch in batches]


def state(seen: Any) -> dict[str, Tensor]:
    low, high = seen.observed_range()
    return {**seen.state_dict(), "low": low, "high": high}


def watch(rank: int) -> dict[str, dict[str, Tensor]]:
    """What every observer holds on this rank: synchronized, and on its own."""
    results = {}
    for kind, name in CASES:
        for way in ("together", "alone"):
            seen = observer(kind, SCHEMES[name], 3)
            seen.synchronize = way == "together"
            for part in parts(rank):
                seen.observe(part)
            results[f"{kind} {name} {way}"] = state(seen)
    return results


def one(kind: str, of: QuantizationScheme, batches: list[Tensor]) -> dict[str, Tensor]:
    seen = observer(kind, of, 3)
    for batch in batches:
        seen.observe(batch)
    return state(seen)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(watch, tmp_path_factory.mktemp("ranks"))


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def whole() -> list[Tensor]:
    return [torch.cat(both) for both in zip(parts(0), parts(1), strict=True)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_rank_holds_what_one_observer_of_everything_holds(ranks, kind, name):
    expected = one(kind, SCHEMES[name], whole())
    assert expected["batches_skipped"] == SKIPPED
    assert expected["batches_observed"] == 14 - SKIPPED - WITHOUT_VALUES
    if kind in BINNED:
        assert expected["counts"].sum() == sum(
            batch.numel() for batch in whole() if batch.isfinite().all()
        )
    for rank in ranks:
        assert_equal(rank[f"{kind} {name} together"], expected)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_observer_that_is_not_synchronized_follows_its_own_rank(ranks, kind, name):
    for index, rank in enumerate(ranks):
        assert_equal(rank[f"{kind} {name} alone"], one(kind, SCHEMES[name], parts(index)))


@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_observers_are_not_synchronized_until_a_plugin_says_so(kind):
    assert observer(kind, scheme()).synchronize is False


# torch.compile itself instantiates the classes of autograd functions.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_what_reduces_is_one_graph(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(base, "has_other_ranks", lambda: True)
    seen = observer(kind, SCHEMES["channel"], 3)
    seen.synchronize = True
    compiled = torch.compile(seen.observe, backend="eager", fullgraph=True)
    batches = [part for part in parts(1) if part.numel()][1:4]
    with process_group(tmp_path):
        for batch in batches:
            compiled(batch)
    assert_equal(state(seen), one(kind, SCHEMES["channel"], batches))
