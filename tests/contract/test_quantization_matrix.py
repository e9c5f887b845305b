"""Every layer with every scheme does what the reference page says."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantization_matrix as matrix
from compression_manager.quantization.layers import QUANTIZED_CLASSES

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "quantization.md"
# Tested beside their own modules: MultiheadAttention's output projection, and transformers' layer.
ELSEWHERE = {"NonDynamicallyQuantizableLinear", "Conv1D"}


def documented() -> dict[tuple[str, str], str]:
    """Return (layer, scheme) -> the cell of the page's table."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    head, _, *body = rows
    return {
        (layer, row[0]): cell
        for row in body
        for names, cell in zip(head[1:], row[1:], strict=True)
        for layer in names.split(", ")
    }


@pytest.mark.parametrize("layer", matrix.LAYERS)
def test_each_scheme_does_what_the_page_says(layer: str, tmp_path: Path) -> None:
    cells = documented()
    for index, scheme in enumerate(matrix.SCHEMES):
        outcome = matrix.run(layer, scheme, tmp_path / str(index))
        assert outcome.split(":")[0] == cells[layer, scheme].split(" (")[0], scheme


def test_no_kind_of_layer_and_no_cell_is_left_out() -> None:
    kinds = {kind.__name__ for kind in QUANTIZED_CLASSES}
    assert kinds - set(matrix.LAYERS) <= ELSEWHERE
    expected = {(layer, scheme) for layer in matrix.LAYERS for scheme in matrix.SCHEMES}
    assert set(documented()) == expected
