"""A graph as a picture: one SVG file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from compression_manager.quantization.graph.fake_quantize_op import (
    FakeQuantizeOp,
    format_scale,
    format_zero_point,
)
from compression_manager.quantization.graph.layout import Layout, Place, arrange
from compression_manager.quantization.graph.operations import Operation, format_shape

_HIDDEN = frozenset({"Parameter", "Buffer", "Constant"})
_CHARACTER = 6.65  # of 11 px in a monospaced font, whose letters are 0.6 em wide
_LINE = 14
_ROW_GAP = 26
_MARGIN = 20
_LEGEND = 44

_BOLD = ' font-weight="bold"'

# What a box is -> fill, border, and its name in the legend.
_STYLES = {
    "fake_quantize": ("#ffd8a8", "#d9480f", "fake quantize"),
    "integer": ("#e5dbff", "#5f3dc4", "quantize, dequantize"),
    "weighted": ("#d0ebff", "#1864ab", "layer with weights"),
    "end": ("#d3f9d8", "#2b8a3e", "input, output"),
    "other": ("#f1f3f5", "#868e96", "other operation"),
}


@dataclass(frozen=True)
class _Box:
    lines: tuple[str, ...]
    style: str
    tooltip: str

    @property
    def width(self) -> float:
        return max(map(len, self.lines)) * _CHARACTER + 18

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + 10


def draw(operations: Sequence[Operation], output_ids: Sequence[int]) -> str:
    """Return the text of an SVG file.

    Args:
        operations: whose ids are unique and defined before use.
        output_ids: numbers of the tensors that the model returns; each gets a box of its own.
    """
    boxes = _boxes(operations, output_ids)
    edges = _edges(operations, output_ids, boxes)
    inputs = [item.output_id for item in operations if item.kind == "Input"]
    layout = arrange({key: box.width for key, box in boxes.items()}, edges, inputs)
    tops, heights = _row_positions(layout, boxes)
    used = [style for style in _STYLES if any(box.style == style for box in boxes.values())]
    width = max(layout.width, _legend_width(used)) + 2 * _MARGIN
    height = (tops[-1] + heights[-1] if tops else _LEGEND) + _MARGIN
    left = (width - layout.width) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="DejaVu Sans Mono, Menlo, '
        'Consolas, monospace" font-size="11">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#495057"/></marker>'
        "</defs>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        *_legend(used),
        *(_link(*link, boxes, tops, heights, left) for link in layout.links),
        *(
            _box(boxes[key], left + place.x, tops[place.row], heights[place.row])
            for key, place in layout.boxes.items()
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _boxes(operations: Sequence[Operation], output_ids: Sequence[int]) -> dict[int, _Box]:
    sources = {item.output_id: item for item in operations if item.kind in _HIDDEN}
    boxes = {
        item.output_id: _box_of(item, sources) for item in operations if item.kind not in _HIDDEN
    }
    # Ids are never negative, so that these keys are free.
    for position, number in enumerate(output_ids):
        if number in boxes:
            boxes[-1 - position] = _Box(("Output",), "end", f"t{number} is returned")
    return boxes


def _box_of(operation: Operation, sources: dict[int, Operation]) -> _Box:
    shape = f"t{operation.output_id} {format_shape(operation.shape)}"
    if operation.dtype != "Float32":
        shape += f" {operation.dtype}"
    tooltip = str(operation)
    named = [
        sources[number].arguments()
        for number in operation.input_ids
        if number in sources and sources[number].kind != "Constant"
    ]
    title = operation.kind
    if operation.kind == "Input":
        title = f"Input {operation.arguments()}".rstrip()
    elif named and len(named) == len(operation.input_ids):  # all that it reads is left out
        title = " ".join([operation.kind, *named])
    lines: tuple[str, ...] = (title, shape)
    if isinstance(operation, FakeQuantizeOp):
        numbers = (
            f"{operation.num_bits} bits, scale {format_scale(operation.scale)}, zero "
            f"{format_zero_point(operation.zero_point)}"
        )
        lines = (title, numbers, shape)
    return _Box(lines, _style(operation, reads_weights=bool(named)), tooltip)


def _style(operation: Operation, *, reads_weights: bool) -> str:
    if operation.kind == "FakeQuantize":
        return "fake_quantize"
    if operation.kind in ("Quantize", "Dequantize"):
        return "integer"
    if operation.kind == "Input":
        return "end"
    weighted = reads_weights or operation.kind.startswith(("Linear", "Conv", "Embedding"))
    return "weighted" if weighted else "other"


def _edges(
    operations: Sequence[Operation], output_ids: Sequence[int], boxes: dict[int, _Box]
) -> list[tuple[int, int]]:
    edges = [
        (number, item.output_id)
        for item in operations
        if item.output_id in boxes
        for number in item.input_ids
        if number in boxes
    ]
    edges += [
        (number, -1 - position) for position, number in enumerate(output_ids) if number in boxes
    ]
    return edges


def _row_positions(layout: Layout, boxes: dict[int, _Box]) -> tuple[list[float], list[float]]:
    heights = [0.0] * layout.rows
    for key, place in layout.boxes.items():
        heights[place.row] = max(heights[place.row], boxes[key].height)
    tops = [float(_LEGEND)]
    for height in heights[:-1]:
        tops.append(tops[-1] + height + _ROW_GAP)
    return tops[: layout.rows], heights


def _box(box: _Box, x: float, top: float, row_height: float) -> str:
    fill, border, _ = _STYLES[box.style]
    top += (row_height - box.height) / 2
    texts = "".join(
        f'<text x="{x:.1f}" y="{top + 5 + _LINE * (position + 0.75):.1f}" text-anchor="middle"'
        f"{_BOLD if position == 0 else ''}>"
        f"{escape(line)}</text>"
        for position, line in enumerate(box.lines)
    )
    return (
        f"<g><title>{escape(box.tooltip)}</title>"
        f'<rect x="{x - box.width / 2:.1f}" y="{top:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="5" fill="{fill}" stroke="{border}"/>{texts}</g>'
    )


def _link(
    upper: Place,
    lower: Place,
    boxes: dict[int, _Box],
    tops: Sequence[float],
    heights: Sequence[float],
    left: float,
) -> str:
    """Return a path that is curved between two rows, and vertical where it passes the lower one."""

    def bounds(place: Place) -> tuple[float, float]:
        height = heights[place.row] if place.box is None else boxes[place.box].height
        top = tops[place.row] + (heights[place.row] - height) / 2
        return top, top + height

    start, (end, bottom) = bounds(upper)[1], bounds(lower)
    middle = (start + end) / 2
    from_x, to_x = left + upper.x, left + lower.x
    path = (
        f"M{from_x:.1f} {start:.1f} "
        f"C{from_x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {end:.1f}"
    )
    if lower.box is None:
        return f'<path d="{path} V{bottom:.1f}" fill="none" stroke="#495057"/>'
    return f'<path d="{path}" fill="none" stroke="#495057" marker-end="url(#arrow)"/>'


def _legend(styles: Sequence[str]) -> list[str]:
    parts = []
    x = float(_MARGIN)
    for style in styles:
        fill, border, name = _STYLES[style]
        parts.append(
            f'<rect x="{x:.1f}" y="12" width="14" height="12" rx="3" fill="{fill}" '
            f'stroke="{border}"/><text x="{x + 20:.1f}" y="22">{name}</text>'
        )
        x += _entry_width(name)
    return parts


def _entry_width(name: str) -> float:
    return 20 + len(name) * _CHARACTER + 18


def _legend_width(styles: Sequence[str]) -> float:
    return sum(_entry_width(_STYLES[style][2]) for style in styles)
