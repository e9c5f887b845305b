"""The batch of example inputs, and graphs that leave it open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compression_manager.errors import ConfigError
from compression_manager.tracing.program import batch_size, brief, trace, with_batch


class Masked(nn.Module):
    """Samples (N, 3), and a mask (2,) or (4, 3) that all of them share."""

    def forward(self, samples: Tensor, options: dict[str, Tensor]) -> Tensor:
        return samples * options["scale"] + options["mask"].sum()


class Weighted(nn.Module):
    """Two masks (4, 3) that all samples (N, 3) share; the first is returned."""

    def forward(self, samples: Tensor, options: dict[str, Tensor]) -> Tensor:
        return options["mask"] * 1 + 0 * samples.sum()


def test_samples_are_taken_in_turn_and_the_rest_is_kept() -> None:
    samples, mask, number = torch.arange(6.0).reshape(2, 3), torch.ones(4, 3), torch.tensor(7)
    inputs = (samples, {"mask": mask, "scale": samples[:, :1]}, number, "text", None)
    changed, options, *rest = with_batch(inputs, 5)
    assert changed[:, 0].tolist() == [0, 3, 0, 3, 0]
    assert options["scale"].tolist() == [[0], [3], [0], [3], [0]]
    assert options["mask"] is mask
    assert rest == [number, "text", None]
    assert with_batch(samples, 1).tolist() == [[0, 1, 2]]
    assert with_batch({"x": samples}, 2)["x"].tolist() == samples.tolist()


def test_what_stays_is_copied_if_it_has_gaps() -> None:
    samples, mask = torch.ones(2, 3), torch.arange(24.0).reshape(4, 6)
    inputs = samples, mask.t(), mask[:, :2], mask[:, :1].expand(4, 3)
    _, turned, cut, spread = with_batch(inputs, 2)
    assert turned.stride() == (1, 6)
    assert (cut.stride(), cut.tolist()) == ((2, 1), mask[:, :2].tolist())
    assert (spread.stride(), spread[:, 2].tolist()) == ((3, 1), mask[:, 0].tolist())


def test_a_tensor_that_is_given_twice_is_two_inputs() -> None:
    samples, mask = torch.ones(2, 3), torch.ones(4, 3)
    examples = with_batch((samples, {"scale": samples, "mask": mask, "other": mask}), 2)
    module = trace(Weighted(), examples).module()
    values = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(module(samples, {"scale": samples, "mask": values, "other": mask}), values)
    turned = with_batch((samples, mask.t(), mask.t()), 2)
    assert turned[1] is not turned[2]
    assert turned[2].stride() == (1, 3)


def test_the_batch_is_that_of_the_first_tensor_with_dimensions() -> None:
    assert batch_size((torch.tensor(3), {"x": torch.zeros(5, 2)}, torch.zeros(4))) == 5
    with pytest.raises(ConfigError, match="at least one sample"):
        batch_size(torch.zeros(3, 0))


def test_a_graph_takes_any_batch_but_no_other_size() -> None:
    samples = torch.randn(4, 3)
    inputs = (samples, {"mask": torch.ones(2), "scale": samples[:, :1]})
    module = trace(Masked(), inputs).module()
    for size in (1, 2, 64):
        changed = with_batch(inputs, size)
        assert torch.equal(module(*changed), Masked()(*changed))
    with pytest.raises(AssertionError, match=r"samples\.size\(\)\[1\] == 3"):
        module(torch.randn(4, 5), inputs[1])


def test_an_error_is_shortened_to_its_first_lines() -> None:
    text = brief(ValueError("\n first\n\nsecond \n" + "line\n" * 9))
    assert text == "ValueError: first second line line line line"
    assert len(brief(ValueError("x" * 1000))) < 450


def test_an_error_is_told_with_its_first_cause_and_without_colors() -> None:
    try:
        try:
            int("three")
        except ValueError as error:
            raise KeyError("between") from error
    except KeyError as error:
        wrapped = RuntimeError("Failed in \x1b[96mthis step\x1b[0m.")
        wrapped.__cause__ = error
    assert brief(wrapped) == (
        "RuntimeError: Failed in this step. "
        "Caused by ValueError: invalid literal for int() with base 10: 'three'"
    )
