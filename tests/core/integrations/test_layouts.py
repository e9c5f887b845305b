"""Compiled code that takes inputs in one layout is called with any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.errors import ConfigError
from compression_manager.integrations.layouts import layouts_of, with_layouts


class Several(nn.Module):
    def forward(self, images: Tensor, more: dict[str, Tensor], factor: float = 1.0) -> Tensor:
        return images.sum() + more["mask"].sum() * factor


def seen(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


IMAGES = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
MASK = torch.randn(4, 6).t()  # no samples: its first size is another


def test_inputs_are_laid_out_as_the_examples_were() -> None:
    program = torch.export.export(Several(), (IMAGES, {"mask": MASK}))
    run = with_layouts(seen, layouts_of(program))
    images, mask = torch.randn(5, 3, 4, 5), torch.randn(6, 4)
    (laid_out, more), keywords = run(images, {"mask": mask}, factor=2.0)
    assert torch.equal(laid_out, images)
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(more["mask"], mask)
    assert more["mask"].stride() == MASK.stride()
    assert keywords == {"factor": 2.0}


def test_inputs_that_lie_right_are_not_copied() -> None:
    program = torch.export.export(Several(), (IMAGES, {"mask": MASK}))
    (images, more), _ = with_layouts(seen, layouts_of(program))(IMAGES, {"mask": MASK})
    assert images is IMAGES
    assert more["mask"] is MASK


@pytest.mark.parametrize(
    "input", [torch.randn(8, 3, 4, 5)[::2], torch.randn(1, 3, 1, 1).expand(4, 3, 4, 5)]
)
def test_inputs_with_gaps_are_copied(input: Tensor) -> None:
    program = torch.export.export(Several(), (IMAGES, {"mask": MASK}))
    (images, _), _ = with_layouts(seen, layouts_of(program))(input, {"mask": MASK})
    assert torch.equal(images, input)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.randn(2, 3, 4, 5).double(),
            r"float32 \(batch, 3, 4, 5\), got float64 \(2, 3, 4, 5\)",
        ),
        (torch.randn(2, 3, 5, 5), r"got float32 \(2, 3, 5, 5\)"),
        (torch.randn(3, 4, 5), r"got float32 \(3, 4, 5\)"),
    ],
)
def test_other_types_and_shapes_are_refused(images: Tensor, message: str) -> None:
    program = torch.export.export(Several(), (IMAGES, {"mask": MASK}))
    with pytest.raises(ConfigError, match=message):
        with_layouts(seen, layouts_of(program))(images, {"mask": MASK})
