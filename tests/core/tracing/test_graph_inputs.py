"""Arguments of a model as the named inputs of another runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compression_manager.errors import ConfigError
from compression_manager.tracing.graph_inputs import Arguments, called_as_model

A, B = torch.zeros(2), torch.ones(2)
FLAT = Arguments(("x", "y", "z"), None, {"x": ("x",), "y": ("y",)})
NESTED = Arguments(
    ("batch", "memory"),
    None,
    {
        "batch_a": ("batch", "a"),
        "batch_b_a": ("batch", "b_a"),
        "batch_b_a_1": ("batch", "b-a"),
        "memory_0": ("memory", "0"),
    },
)
VARIADIC = Arguments(("x",), "more", {"x": ("x",), "more_0": ("more", "0"), "key": ("key",)})
PAIRED = Arguments(
    ("img", "txt", "mask"),
    None,
    {"img": ("img",), "txt": ("txt",), "mask": ("mask",)},
    {"img": ["batch", 2], "txt": ["batch"], "mask": [2, 3]},
)


def fed(arguments: Arguments, *args: Any, **kwargs: Any) -> dict[str, list[float]]:
    """What the runtime is given."""
    given: dict[str, list[float]] = {}

    def compute(feed: Any) -> list[Any]:
        given.update({name: array.tolist() for name, array in feed.items()})
        return [A.numpy()]

    called_as_model(arguments, compute)(*args, **kwargs)
    return given


def test_tensors_go_by_position_and_by_name() -> None:
    expected = {"x": [0, 0], "y": [1, 1]}
    assert fed(FLAT, A, B) == expected
    assert fed(FLAT, A, y=B) == expected
    assert fed(FLAT, y=B, x=A) == expected
    assert fed(FLAT, A, B, None) == expected
    assert fed(Arguments.of_names(["x", "y"]), A, y=B) == expected


def test_positions_are_the_model_s_even_if_the_examples_came_by_name() -> None:
    named = Arguments(("x", "y"), None, {"y": ("y",), "x": ("x",)})
    assert fed(named, A, B) == {"x": [0, 0], "y": [1, 1]}
    with pytest.raises(ConfigError, match="takes no tensor as y; Valid: x, z"):
        fed(Arguments(("x", "y", "z"), None, {"x": ("x",), "z": ("z",)}), A, B)


def test_entries_of_mappings_come_in_any_order() -> None:
    entries = {"a": A, "b_a": B, "b-a": A + 2}
    expected = {"batch_a": [0, 0], "batch_b_a": [1, 1], "batch_b_a_1": [2, 2], "memory_0": [3, 3]}
    for batch in (entries, dict(reversed(entries.items()))):
        assert fed(NESTED, batch, [A + 3]) == expected
        assert fed(NESTED, memory=(A + 3,), batch=batch) == expected


def test_what_is_variadic_is_taken() -> None:
    expected = {"x": [0, 0], "more_0": [1, 1], "key": [2, 2]}
    assert fed(VARIADIC, A, B, key=A + 2) == expected
    with pytest.raises(ConfigError, match="takes no tensor as more 1"):
        fed(VARIADIC, A, B, B, key=A + 2)


def test_what_a_file_keeps_is_read_back() -> None:
    for arguments in (FLAT, NESTED, VARIADIC, PAIRED):
        assert Arguments.from_json(arguments.to_json()) == arguments
    older = '{"positional": ["x"], "variadic": null, "paths": {"x": ["x"]}}'
    assert fed(Arguments.from_json(older), A) == {"x": [0, 0]}


def test_what_is_no_tensor_is_refused() -> None:
    assert fed(FLAT, A, B, None) == {"x": [0, 0], "y": [1, 1]}
    with pytest.raises(ConfigError, match=r"takes tensors only, got 3\.0 as temperature"):
        fed(FLAT, A, B, temperature=3.0)
    with pytest.raises(ConfigError, match="got True as options residual"):
        fed(FLAT, A, B, options={"residual": True})
    with pytest.raises(ConfigError, match="got 3 as z"):
        fed(FLAT, A, B, 3)


@pytest.mark.parametrize(
    ("args", "names", "message"),
    [
        ((A,), (), "needs a tensor as y; it was"),
        ((), (), "needs a tensor as x, y; it was"),
        ((A, B, A), (), "takes no tensor as z"),
        ((A, B, None, A), (), r"at most 3 arguments by position \(x, y, z\), got 4"),
        ((A, B), ("x",), "got x by position and by name"),
        ((A,), ("bias",), "takes no tensor as bias"),
    ],
)
def test_other_arguments_are_refused(
    args: tuple[Any, ...], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fed(FLAT, *args, **dict.fromkeys(names, B))


def test_gradients_are_left_behind() -> None:
    assert fed(Arguments.of_names(["x"]), torch.ones(1, requires_grad=True)) == {"x": [1]}


def test_one_output_is_a_tensor_and_several_are_a_tuple() -> None:
    x = Arguments.of_names(["x"])
    one = called_as_model(x, lambda feed: [A.numpy()])(A)
    assert torch.equal(one, A)
    several = called_as_model(x, lambda feed: [A.numpy(), B.numpy()])(A)
    assert isinstance(several, tuple)
    assert [item.tolist() for item in several] == [[0, 0], [1, 1]]


def test_inputs_have_the_sizes_that_a_file_takes_and_equally_many_samples() -> None:
    mask = torch.zeros(2, 3)
    for samples in (1, 4):
        fed(PAIRED, torch.zeros(samples, 2), torch.zeros(samples), mask)
    message = r"inputs 'img' and 'txt' must hold equally many samples, .* got 1 and 4\."
    with pytest.raises(ConfigError, match=message):
        fed(PAIRED, torch.zeros(1, 2), torch.zeros(4), mask)
    message = r"takes mask of the sizes \(2, 3\), got \(3, 3\)"
    with pytest.raises(ConfigError, match=message):
        fed(PAIRED, torch.zeros(1, 2), torch.zeros(1), torch.zeros(3, 3))
    with pytest.raises(ConfigError, match=r"takes txt of the sizes \(batch,\), got \(1, 1\)"):
        fed(PAIRED, torch.zeros(1, 2), torch.zeros(1, 1), mask)
