"""The picture: complete, well-formed, and without overlaps."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from compression_manager import ConfigError
from compression_manager.quantization import FakeQuantizeOp, QuantizationGraph
from compression_manager.quantization.graph import TensorOp
from compression_manager.quantization.graph.layout import Layout, arrange
from toys import mlp

SVG = "{http://www.w3.org/2000/svg}"
ORANGE = "#ffd8a8"


class Residual(nn.Module):
    """Blocks whose input goes around them, as in a ResNet."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(block(x).sigmoid() + x)
        return x


def boxes(svg: str) -> list[tuple[str, ElementTree.Element, list[str]]]:
    """Return tooltip, rectangle and texts of each box."""
    return [
        (
            group.findtext(f"{SVG}title") or "",
            group.find(f"{SVG}rect"),
            [text.text or "" for text in group.iter(f"{SVG}text")],
        )
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
    ]


def bounds(rectangle: ElementTree.Element) -> tuple[float, float, float, float]:
    x, y, width, height = (float(rectangle.get(name)) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


@pytest.fixture(scope="module")
def residual() -> QuantizationGraph:
    return QuantizationGraph.record(Residual(), torch.randn(2, 6))


def test_every_operation_has_a_box_with_its_line(residual: QuantizationGraph) -> None:
    shown = [tooltip for tooltip, _, _ in boxes(residual.to_svg())]
    expected = [str(item) for item in residual if item.kind != "Parameter"]
    assert shown == [*expected, f"t{residual.output_ids[0]} is returned"]


def test_boxes_do_not_overlap_and_lie_inside(residual: QuantizationGraph) -> None:
    svg = residual.to_svg()
    root = ElementTree.fromstring(svg)
    placed = [bounds(rectangle) for _, rectangle, _ in boxes(svg)]
    for index, (left, top, right, bottom) in enumerate(placed):
        assert left >= 0
        assert top >= 30  # below the legend
        assert right <= float(root.get("width"))
        assert bottom <= float(root.get("height"))
        for other in placed[:index]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart


def test_texts_fit_into_their_boxes(residual: QuantizationGraph) -> None:
    for _, rectangle, texts in boxes(residual.to_svg()):
        left, _, right, _ = bounds(rectangle)
        for text in texts:
            # The letters of a monospaced font of 11 px are 0.6 em wide.
            assert len(text) * 0.6 * 11 < right - left


def test_edges_run_beside_boxes(residual: QuantizationGraph) -> None:
    svg = residual.to_svg()
    placed = [bounds(rectangle) for _, rectangle, _ in boxes(svg)]
    vertical = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        # A curve ends at the place from which a vertical line goes on.
        for x, top, bottom in re.findall(r"(\S+) (\S+) V(\S+)", path.get("d")):
            vertical.append((float(x), float(top), float(bottom)))
    assert len(vertical) >= 3  # each block's shortcut passes at least one row
    for x, start, end in vertical:
        for left, top, right, bottom in placed:
            assert not (left < x < right and start < bottom and top < end)


def test_fake_quantizations_are_coloured_and_say_what_they_do() -> None:
    op = FakeQuantizeOp(0, 1, (2,), 4, 0.5)
    svg = QuantizationGraph([TensorOp("Input", (), 0, (2,)), op], [1]).to_svg()
    fills = {texts[0]: rectangle.get("fill") for _, rectangle, texts in boxes(svg)}
    assert fills["FakeQuantize"] == ORANGE
    assert ORANGE not in (fills["Input"], fills["Output"])
    assert "4 bits, scale 0.5, zero 0" in svg


def test_the_quantizer_of_a_weight_carries_its_name() -> None:
    weight = TensorOp("Parameter", (), 0, (2,), label="fc.weight")
    svg = QuantizationGraph([weight, FakeQuantizeOp(0, 1, (2,))], [1]).to_svg()
    assert [texts[0] for _, _, texts in boxes(svg)] == ["FakeQuantize fc.weight", "Output"]


def test_names_are_escaped() -> None:
    graph = QuantizationGraph([TensorOp("Input", (), 0, (2,), label="<a & b>")])
    ((tooltip, _, texts),) = boxes(graph.to_svg())
    assert "<a & b>" in tooltip
    assert texts[0] == "Input <a & b>"


def test_an_empty_graph_is_a_picture() -> None:
    assert boxes(QuantizationGraph().to_svg()) == []


def test_the_picture_needs_nothing_else(residual: QuantizationGraph) -> None:
    svg = residual.to_svg().replace("http://www.w3.org/2000/svg", "")
    assert "http" not in svg
    assert "href" not in svg
    assert "<script" not in svg


def test_saving(tmp_path: Path) -> None:
    graph = QuantizationGraph.record(mlp(), torch.randn(2, 6))
    path = graph.save_svg(tmp_path / "graph.svg")
    assert path.read_text(encoding="utf-8") == graph.to_svg()
    with pytest.raises(ConfigError, match=r"save_svg cannot write .*missing.*folder that exists"):
        graph.save_svg(tmp_path / "missing" / "graph.svg")


# The layout of any graph -------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[int, float], list[tuple[int, int]], list[int]]:
    count = draw(st.integers(1, 14))
    widths = {key: draw(st.floats(10, 200)) for key in range(count)}
    pairs = [(start, end) for end in range(count) for start in range(end)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=25)) if pairs else []
    return widths, edges, draw(st.lists(st.sampled_from(range(count)), max_size=2))


def _rows(layout: Layout) -> list[list]:
    rows: list[list] = [[] for _ in range(layout.rows)]
    for place in [*layout.boxes.values(), *layout.lanes]:
        rows[place.row].append(place)
    return rows


def _connected(layout: Layout) -> set[tuple[int, int]]:
    """Return the boxes that chains of links join, whatever lanes they share."""
    upper_of = {id(lower): upper for upper, lower in layout.links if lower.box is None}
    found = set()
    for upper, lower in layout.links:
        if lower.box is None:
            continue
        while upper.box is None:
            upper = upper_of[id(upper)]
        found.add((upper.box, lower.box))
    return found


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_any_layout(graph: tuple[dict[int, float], list[tuple[int, int]], list[int]]) -> None:
    widths, edges, roots = graph
    layout = arrange(widths, edges, roots)
    assert _connected(layout) == set(edges)
    assert all(lower.row == upper.row + 1 for upper, lower in layout.links)
    for row in _rows(layout):
        ordered = sorted(row, key=lambda place: place.x)
        for left, right in pairwise(ordered):
            assert right.x - left.x >= (left.width + right.width) / 2
        for place in ordered:
            assert place.x - place.width / 2 >= -1e-6
            assert place.x + place.width / 2 <= layout.width + 1e-6


def test_edges_of_one_box_share_lanes() -> None:
    edges = [*pairwise(range(6)), *((0, end) for end in range(2, 6))]
    layout = arrange(dict.fromkeys(range(6), 50.0), edges, roots=[0])
    assert len(layout.lanes) == 4
    assert _connected(layout) == set(edges)


def test_a_chain_is_straight() -> None:
    layout = arrange(dict.fromkeys(range(5), 50.0), list(pairwise(range(5))))
    assert [place.row for place in layout.boxes.values()] == [0, 1, 2, 3, 4]
    assert {place.x for place in layout.boxes.values()} == {25.0}


def test_what_the_inputs_do_not_reach_stands_right_above_its_reader() -> None:
    chain = [(0, 1), (1, 2), (2, 5), (3, 4), (4, 5)]
    layout = arrange(dict.fromkeys(range(6), 50.0), chain, roots=[0])
    assert [layout.boxes[key].row for key in range(6)] == [0, 1, 2, 1, 2, 3]
    assert layout.boxes[5].x == pytest.approx(layout.boxes[0].x, abs=15)
