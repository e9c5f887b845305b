"""Arguments of a model as the named inputs of another runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compression_manager.errors import ConfigError
from compression_manager.integrations.graph_inputs import called_as_model

A, B = torch.zeros(2), torch.ones(2)


def fed(names: list[str], *args: Any, **kwargs: Any) -> dict[str, list[float]]:
    """What the runtime is given."""
    given: dict[str, list[float]] = {}

    def compute(feed: Any) -> list[Any]:
        given.update({name: array.tolist() for name, array in feed.items()})
        return [A.numpy()]

    called_as_model(names, compute)(*args, **kwargs)
    return given


def test_tensors_go_by_position_and_by_name() -> None:
    expected = {"x": [0, 0], "y": [1, 1]}
    assert fed(["x", "y"], A, B) == expected
    assert fed(["x", "y"], A, y=B) == expected
    assert fed(["x", "y"], y=B, x=A) == expected
    assert fed(["x", "y"], B, x=A) == expected
    assert fed(["x", "options_y"], A, options={"y": B}) == {"x": [0, 0], "options_y": [1, 1]}


def test_entries_of_mappings_come_in_any_order() -> None:
    expected = {"batch_a": [0, 0], "batch_b": [1, 1]}
    assert fed(["batch_a", "batch_b"], {"a": A, "b": B}) == expected
    assert fed(["batch_a", "batch_b"], {"b": B, "a": A}) == expected
    assert fed(["batch_a", "batch_b"], batch={"b": B, "a": A}) == expected
    names = ["x", "memory_0", "memory_1"]
    given = fed(names, memory=(B, A), x=A)
    assert given == {"x": [0, 0], "memory_0": [1, 1], "memory_1": [0, 0]}
    # Names that tell nothing leave the order.
    assert fed(["input", "input_1"], {"b": B}, A) == {"input": [1, 1], "input_1": [0, 0]}


def test_what_is_no_tensor_is_refused() -> None:
    assert fed(["x"], A, None, mask=None) == {"x": [0, 0]}
    with pytest.raises(ConfigError, match=r"takes tensors only, got 3\.0 as temperature"):
        fed(["x"], A, temperature=3.0)
    with pytest.raises(ConfigError, match="got True as options residual"):
        fed(["x"], A, options={"residual": True})
    with pytest.raises(ConfigError, match="got 3 as an argument"):
        fed(["x"], A, 3)


def test_gradients_are_left_behind() -> None:
    assert fed(["x"], torch.ones(1, requires_grad=True)) == {"x": [1]}


@pytest.mark.parametrize("arguments", [(), (A,), (A, B, A)])
def test_another_number_of_tensors_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"takes the tensors x, y; got {len(arguments)} by"):
        fed(["x", "y"], *arguments)


def test_one_output_is_a_tensor_and_several_are_a_tuple() -> None:
    one = called_as_model(["x"], lambda feed: [A.numpy()])(A)
    assert torch.equal(one, A)
    several = called_as_model(["x"], lambda feed: [A.numpy(), B.numpy()])(A)
    assert isinstance(several, tuple)
    assert [item.tolist() for item in several] == [[0, 0], [1, 1]]
