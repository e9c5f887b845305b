"""Items that carry their ids, and augmentation that follows from a seed and the id."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import toys
from compression_manager import ConfigError
from compression_plugins import IndexedDataset


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ((3.0, "label"), (3.0, "label", 1)),
        ([3.0, 4.0], (3.0, 4.0, 1)),
        ("text", ("text", 1)),
        ({"x": 3.0}, {"x": 3.0, "sample_ids": 1}),
    ],
)
def test_items_get_their_index(item: Any, expected: Any) -> None:
    assert IndexedDataset(["other", item])[1] == expected


def test_a_loader_collates_the_ids() -> None:
    batches = list(DataLoader(IndexedDataset(toys.vectors(10)), batch_size=4))
    assert [ids.tolist() for _, _, ids in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[0][2].dtype == torch.int64


def test_indices_are_those_of_a_sequence() -> None:
    data = IndexedDataset(["a", "b", "c"])
    assert (len(data), data[-1]) == (3, ("c", 2))
    assert list(data) == [("a", 0), ("b", 1), ("c", 2)]
    with pytest.raises(IndexError):
        data[3]


def test_a_taken_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="item 0 of the data set has a key 'sample_ids' already"):
        IndexedDataset([{"sample_ids": 4}])[0]


@pytest.mark.parametrize("data", [5, iter([1, 2])])
def test_data_without_length_and_items_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="of an iterable data set yield the ids yourself"):
        IndexedDataset(data)


class Augmented:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_augmentation_follows_from_seed_and_id() -> None:
    data = IndexedDataset(Augmented(), augmentation_seed=4)
    first = [data[index] for index in range(3)]
    torch.rand(5)
    assert [data[index] for index in (2, 0, 1)] == [first[2], first[0], first[1]]
    values = {value for item in first for value in item[:3]}
    data.augmentation_seed = 5
    values |= {value for item in data for value in item[:3]}
    assert len(values) == 2 * 3 * 3


def test_augmentation_differs_every_time_without_a_seed() -> None:
    data = IndexedDataset(Augmented())
    assert all(a != b for a, b in zip(data[0][:3], data[0][:3], strict=True))


def test_the_generators_are_put_back() -> None:
    data = IndexedDataset(Augmented(), augmentation_seed=1)

    def draw() -> tuple[float, ...]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        return Augmented()[0]

    expected = draw()
    draw()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    data[0]
    assert Augmented()[0] == expected
