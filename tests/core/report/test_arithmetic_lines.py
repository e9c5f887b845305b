"""Layers in a report: many names on a line, in short."""

from __future__ import annotations

import pytest

from compression_manager.report.arithmetic_lines import in_short


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"layers.{i}.fc" for i in range(4)], "layers.{0-3}.fc"),
        (
            ["head", *(f"layers.{i}.fc" for i in (0, 2, 3, 7)), "out"],
            "head, layers.{0,2-3,7}.fc, out",
        ),
        (["layers.0.fc", "layers.1.fc"], "layers.0.fc, layers.1.fc"),
        (["0", "2", "4"], "{0,2,4}"),
        ([""], ""),
        (["a.b", "a.c", "a.d"], "a.b, a.c, a.d"),
        (["a.00", "a.0", "a.01", "a.02"], "a.00, a.0, a.01, a.02"),
        # Of two numbers, the one in which more names differ.
        (
            [f"stages.{i}.{j}.conv" for i in range(2) for j in range(3)],
            "stages.0.{0-2}.conv, stages.1.{0-2}.conv",
        ),
        (
            [f"blocks.{i}.{name}" for i in range(10, 13) for name in ("q", "v")],
            "blocks.{10-12}.q, blocks.{10-12}.v",
        ),
    ],
)
def test_names_that_differ_in_one_number_are_one(names: list[str], expected: str) -> None:
    assert in_short(names) == expected
