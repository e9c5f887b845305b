"""Compiled code that takes inputs in one layout is called with any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.errors import ConfigError
from compression_manager.tracing.compiled_inputs import (
    called_as_examples,
    described_examples,
)
from compression_manager.tracing.program import batch_shapes


class Several(nn.Module):
    def forward(self, images: Tensor, more: dict[str, Tensor], factor: float = 1.0) -> Tensor:
        return images.sum() + more["mask"].sum() * factor


class Pairs(nn.Module):
    def forward(self, pair: dict[str, Tensor], scale: float, mask: Tensor | None = None) -> Tensor:
        return (pair["left"] - pair["right"]) * scale


def described(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    shapes = batch_shapes(args, kwargs)
    return described_examples(torch.export.export(model, args, kwargs, dynamic_shapes=shapes))


def seen(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


IMAGES = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
MASK = torch.randn(4, 6).t()  # no samples: its first size is another
SEVERAL = described(Several(), IMAGES, {"mask": MASK})


def test_inputs_are_laid_out_as_the_examples_were() -> None:
    run = called_as_examples(seen, SEVERAL)
    images, mask = torch.randn(5, 3, 4, 5), torch.randn(6, 4)
    (laid_out, more), _ = run(images, {"mask": mask})
    assert torch.equal(laid_out, images)
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(more["mask"], mask)
    assert more["mask"].stride() == MASK.stride()


def test_inputs_that_lie_right_are_not_copied() -> None:
    (images, more), _ = called_as_examples(seen, SEVERAL)(IMAGES, {"mask": MASK})
    assert images is IMAGES
    assert more["mask"] is MASK


@pytest.mark.parametrize(
    "input", [torch.randn(8, 3, 4, 5)[::2], torch.randn(1, 3, 1, 1).expand(4, 3, 4, 5)]
)
def test_inputs_with_gaps_are_copied(input: Tensor) -> None:
    (images, _), _ = called_as_examples(seen, SEVERAL)(input, {"mask": MASK})
    assert torch.equal(images, input)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.randn(2, 3, 4, 5).double(),
            r"float32 \(batch, 3, 4, 5\) as args\[0\], got float64 \(2, 3, 4, 5\)",
        ),
        (torch.randn(2, 3, 5, 5), r"got float32 \(2, 3, 5, 5\)"),
        (torch.randn(3, 4, 5), r"got float32 \(3, 4, 5\)"),
    ],
)
def test_other_types_and_shapes_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        called_as_examples(seen, SEVERAL)(images, {"mask": MASK})


PAIR = {"left": torch.randn(2, 3), "right": torch.randn(2, 3)}
PAIRS = described(Pairs(), PAIR, scale=2.0, mask=None)


def test_mappings_may_have_their_entries_in_any_order() -> None:
    turned = dict(reversed(PAIR.items()))
    (pair,), keywords = called_as_examples(seen, PAIRS)(turned, scale=2.0)
    assert list(pair) == ["left", "right"]
    assert all(pair[name] is PAIR[name] for name in pair)
    assert keywords == {"scale": 2.0, "mask": None}


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((PAIR,), {"scale": 3.0}, r"exported with 2\.0 as kwargs\['scale'\], got 3\.0"),
        ((PAIR,), {}, r"exported with 2\.0 as kwargs\['scale'\], got None"),
        (
            (PAIR,),
            {"scale": 2.0, "mask": MASK},
            r"exported with None as kwargs\['mask'\], got float32 \(6, 4\)",
        ),
        (
            ({"left": PAIR["left"]},),
            {"scale": 2.0},
            r"a tensor of float32 \(batch, 3\) as args\[0\]\['right'\], got None",
        ),
        (
            (PAIR, MASK),
            {"scale": 2.0},
            r"takes no args\[1\]; it was exported with args\[0\]\['left'\], args",
        ),
    ],
)
def test_other_arguments_are_refused(
    arguments: tuple[Any, ...], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        called_as_examples(seen, PAIRS)(*arguments, **keywords)


def test_all_inputs_hold_equally_many_samples() -> None:
    run = called_as_examples(seen, PAIRS)
    run({"left": torch.randn(5, 3), "right": torch.randn(5, 3)}, scale=2.0)
    message = r"\['left'\]\" and \"args\[0\]\['right'\]\" must hold equally many .* got 1 and 4\."
    with pytest.raises(ConfigError, match=message):
        run({"left": torch.randn(1, 3), "right": torch.randn(4, 3)}, scale=2.0)


def test_sizes_that_were_fixed_stay() -> None:
    run = called_as_examples(seen, described_examples(torch.export.export(Pairs(), (PAIR, 2.0))))
    run(PAIR, 2.0)
    with pytest.raises(ConfigError, match=r"float32 \(2, 3\) as .* got float32 \(1, 3\)"):
        run({name: value[:1] for name, value in PAIR.items()}, 2.0)
