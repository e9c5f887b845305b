"""Where the boxes of a layered drawing stand, and which way its edges take.

Rows follow the longest path from the inputs; edges over several rows keep a lane of their own in
each, so that they run beside boxes and not across them. (Sugiyama, Tagawa, Toda 1981: rows,
order within rows by barycenters, then positions.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_SWEEPS = 12
_GAP = 22.0
_LANE = 12.0
# How much a place, and an edge, insists on being straight: the path from box to box through the
# model most, what only joins it least.
_MAIN, _LANE_WEIGHT, _SIDE = 8.0, 2.0, 1.0


@dataclass
class Place:
    """A box, or the lane of an edge that passes a row.

    Attributes:
        row: 0 is the top.
        width: in pixels.
        x: centre, in pixels from the left.
        box: the box's key, or None for a lane.
        weight: how much it insists on the position that it wants.
    """

    row: int
    width: float
    x: float = 0.0
    box: int | None = None
    weight: float = _LANE_WEIGHT


@dataclass(frozen=True)
class Layout:
    """All positions.

    Attributes:
        boxes: key -> place.
        lanes: the places where edges pass a row.
        links: upper and lower place, one row apart; an edge is a chain of them. Edges from one
            box share lanes as long as they go the same way.
        width: of the drawing, in pixels.
        rows: their number.
    """

    boxes: Mapping[int, Place]
    lanes: Sequence[Place]
    links: Sequence[tuple[Place, Place]]
    width: float
    rows: int


def arrange(
    widths: Mapping[int, float], edges: Sequence[tuple[int, int]], roots: Iterable[int] = ()
) -> Layout:
    """Return a layout of boxes with the given widths.

    Args:
        widths: key -> width of the box in pixels; keys in an order in which every edge leads
            from an earlier box to a later one.
        edges: (from, to).
        roots: keys of the boxes where the main paths begin; what no path from them reaches
            stands beside and right above its reader.
    """
    reached = _reached(list(widths), edges, roots)
    row_of = _rows(list(widths), edges, reached)
    boxes = {
        key: Place(row_of[key], width, box=key, weight=_MAIN if key in reached else _SIDE)
        for key, width in widths.items()
    }
    lanes, links = _connect(boxes, edges)
    rows: list[list[Place]] = [[] for _ in range(1 + max(row_of.values(), default=-1))]
    for place in [*boxes.values(), *lanes]:
        rows[place.row].append(place)
    above, below = _neighbours(links)
    _order(rows, above, below)
    _position(rows, above, below)
    return Layout(boxes, lanes, links, _move_to_origin(rows), len(rows))


def _reached(
    keys: Sequence[int], edges: Sequence[tuple[int, int]], roots: Iterable[int]
) -> set[int]:
    before: dict[int, set[int]] = {key: set() for key in keys}
    for start, end in edges:
        before[end].add(start)
    reached = set(roots)
    for key in keys:
        if before[key] & reached:
            reached.add(key)
    return reached


def _rows(
    keys: Sequence[int], edges: Sequence[tuple[int, int]], reached: set[int]
) -> dict[int, int]:
    before: dict[int, list[int]] = {key: [] for key in keys}
    after: dict[int, list[int]] = {key: [] for key in keys}
    for start, end in edges:
        before[end].append(start)
        after[start].append(end)
    row: dict[int, int] = {}
    for key in keys:
        row[key] = 1 + max((row[item] for item in before[key]), default=-1)
    for key in reversed(keys):
        if key not in reached and after[key]:
            row[key] = min(row[item] for item in after[key]) - 1
    return row


def _connect(
    boxes: Mapping[int, Place], edges: Sequence[tuple[int, int]]
) -> tuple[list[Place], list[tuple[Place, Place]]]:
    """Return the lanes and links of all edges."""
    trunks: dict[int, list[Place]] = {}
    links: list[tuple[Place, Place]] = []
    for start, end in dict.fromkeys(edges):
        trunk = trunks.setdefault(start, [boxes[start]])
        length = boxes[end].row - boxes[start].row
        while len(trunk) < length:
            trunk.append(Place(trunk[-1].row + 1, _LANE))
            links.append((trunk[-2], trunk[-1]))
        links.append((trunk[length - 1], boxes[end]))
    return [lane for trunk in trunks.values() for lane in trunk[1:]], links


_Neighbours = dict[int, list[tuple[Place, float]]]


def _neighbours(links: Iterable[tuple[Place, Place]]) -> tuple[_Neighbours, _Neighbours]:
    """Return what is joined to each place from above and from below, with the edges' weights."""
    above: _Neighbours = {}
    below: _Neighbours = {}
    for upper, lower in links:
        weight = min(upper.weight, lower.weight)
        above.setdefault(id(lower), []).append((upper, weight))
        below.setdefault(id(upper), []).append((lower, weight))
    return above, below


def _order(rows: list[list[Place]], above: _Neighbours, below: _Neighbours) -> None:
    """Sort each row by the mean index of its neighbours, downwards and upwards in turn."""
    for sweep in range(_SWEEPS):
        neighbours, order = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        index: dict[int, float] = {}
        for row in order:
            wanted: dict[int, float] = {}
            for position, place in enumerate(row):
                joined = [(index[id(item)], 1.0) for item, _ in neighbours.get(id(place), ())]
                wanted[id(place)] = _mean(joined, position)
            # The default keeps this row's dict; mypy cannot infer such a lambda.
            row.sort(key=lambda place, wanted=wanted: wanted[id(place)])  # type: ignore[misc]
            index.update((id(place), float(position)) for position, place in enumerate(row))


def _mean(values: Sequence[tuple[float, float]], default: float) -> float:
    """Return the weighted mean of (value, weight)."""
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total if total else default


def _position(rows: list[list[Place]], above: _Neighbours, below: _Neighbours) -> None:
    for row in rows:
        _pack(row, [0.0] * len(row))
    for sweep in range(2 * _SWEEPS + 1):
        downwards = sweep % 2 == 0
        neighbours = above if downwards else below
        for row in rows if downwards else rows[::-1]:
            joined = [neighbours.get(id(place), ()) for place in row]
            wanted = [
                _mean([(item.x, weight) for item, weight in items], place.x)
                for place, items in zip(row, joined, strict=True)
            ]
            _pack(row, wanted)


def _pack(row: list[Place], wanted: Sequence[float]) -> None:
    """Place a row as near to the wanted positions as its widths allow, in least squares.

    Subtracting the least distances leaves an isotonic regression, solved by pooling adjacent
    violators (Ayer et al., 1955).
    """
    offsets = [0.0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + _GAP)
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for place, x, offset in zip(row, wanted, offsets, strict=False):
        mean, weight, members = x - offset, place.weight, 1
        while pools and pools[-1][0] > mean:
            other, other_weight, other_members = pools.pop()
            mean = (mean * weight + other * other_weight) / (weight + other_weight)
            weight, members = weight + other_weight, members + other_members
        pools.append((mean, weight, members))
    means = [mean for mean, _, members in pools for _ in range(members)]
    for place, mean, offset in zip(row, means, offsets, strict=False):
        place.x = mean + offset


def _move_to_origin(rows: list[list[Place]]) -> float:
    """Shift everything to start at 0, and return the width."""
    places = [place for row in rows for place in row]
    left = min((place.x - place.width / 2 for place in places), default=0.0)
    for place in places:
        place.x -= left
    return max((place.x + place.width / 2 for place in places), default=0.0)
