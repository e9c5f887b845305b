"""Which weights are pruned: against a sort in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compression_magnitude_pruning.masks import prune, select_weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compression_manager import ConfigError

# Few values, so that there are ties and zeros; -0.0 and 0.0 are equal.
VALUES = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0]) | st.floats(-3, 3, width=32)


@st.composite
def weights(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for shape in draw(st.lists(st.sampled_from([(1, 1), (2, 3), (4, 1, 2)]), min_size=1)):
        count = int(np.prod(shape))
        values = draw(st.lists(VALUES, min_size=count, max_size=count))
        mask = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        found.append((np.array(values, np.float32).reshape(shape), np.array(mask).reshape(shape)))
    return found


def reference(pairs: list[tuple[np.ndarray, np.ndarray]], sparsity: float) -> np.ndarray:
    """What is kept, over all weights: masked first, then small first, then in their order."""
    values = np.concatenate([value.ravel() for value, _ in pairs]).astype(np.float64)
    masks = np.concatenate([mask.ravel() for _, mask in pairs])
    order = sorted(range(len(values)), key=lambda i: (bool(masks[i]), masks[i] * abs(values[i]), i))
    kept = np.ones(len(values), bool)
    kept[order[: round(sparsity * len(values))]] = False
    return kept


@given(pairs=weights(), sparsity=st.floats(0, 1))
def test_prune(pairs: list[tuple[np.ndarray, np.ndarray]], sparsity: float) -> None:
    tensors = [(torch.from_numpy(value), torch.from_numpy(mask)) for value, mask in pairs]
    found = prune(tensors, sparsity)
    assert [mask.shape for mask in found] == [value.shape for value, _ in pairs]
    flat = np.concatenate([mask.numpy().ravel() for mask in found])
    np.testing.assert_array_equal(flat, reference(pairs, sparsity))


def test_what_is_pruned_already_comes_before_other_zeros() -> None:
    (mask,) = prune([(torch.zeros(1, 4), torch.tensor([[True, True, False, True]]))], 0.5)
    assert mask.tolist() == [[False, True, False, True]]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.other = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*"], [], ["embedding.weight", "other.weight"]),
        (["head.*"], [], ["embedding.weight"]),
        (["*"], ["head.weight"], ["other.weight"]),
        (["other.weight"], [], ["other.weight"]),
    ],
)
def test_weights_are_selected_by_any_of_their_names(
    include: list[str], exclude: list[str], expected: list[str]
) -> None:
    assert select_weights(Tied(), include, exclude) == expected


@pytest.mark.parametrize(
    ("include", "exclude", "option", "message"),
    [
        (["*", "othr.weight"], [], "include[1]", "did you mean 'other.weight'"),
        (["*"], ["norm.weight"], "exclude[0]", "'norm.weight' names no weight"),
        (["other.*"], ["*"], None, "no weight is left to prune"),
    ],
)
def test_patterns_without_effect_are_refused(
    include: list[str], exclude: list[str], option: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        select_weights(Tied(), include, exclude)
    assert error.value.option == option
