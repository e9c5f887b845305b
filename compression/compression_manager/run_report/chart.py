"""Charts as inline SVG, whose colors follow the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from compression_manager.run_report.axes import Axis, path, step_axis, value_axis
from compression_manager.run_report.curve import Curve, smoothed, thinned
from compression_manager.run_report.text import number

COLORS = 8
WIDE, NARROW = 960.0, 460.0
_HEIGHT = 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 12.0, 10.0, 34.0
_RAW_POINTS = 300
_SMOOTH_POINTS = 60
# Fewer points are drawn as they are, each with a dot.
_SMOOTH_FROM = 150
_DOTS_UP_TO = 40
_SMALL_WIDTH, _SMALL_HEIGHT = 240.0, 84.0


def line_chart(
    title: str, lines: Mapping[str, Curve], *, width: float = NARROW, marked: int | None = None
) -> str:
    """Return a figure: one line per curve over the optimizer steps, and a legend.

    A curve of many points is drawn faintly, with its mean over runs of neighboring points on top.
    The values have a logarithmic axis if all are positive and far apart.

    Args:
        title: caption.
        lines: label -> curve, in the order of the legend, which also chooses the colors; one
            without points is left out.
        width: pixels, where the page has room for them.
        marked: a step that a vertical line marks as the best.
    """
    colored = [
        (label, curve, f"c{index % COLORS}")
        for index, (label, curve) in enumerate(lines.items())
        if curve.steps
    ]
    values = [value for curve in lines.values() for value in curve.finite()]
    x = step_axis(lines.values(), _LEFT, width - _RIGHT)
    y = value_axis(values, _HEIGHT - _BOTTOM, _TOP, may_be_log=True)
    drawn = "".join(_line(*item, x, y) for item in colored)
    legend = "".join(_legend_entry(*item) for item in colored)
    return (
        f"<figure><figcaption>{escape(title)}{_remarks(lines, y)}</figcaption>"
        f'<svg viewBox="0 0 {width:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{escape(title)} over optimizer steps">'
        f"{_grid(x, y)}{_mark(marked, x)}{drawn}</svg>"
        f'<ul class="legend">{legend}</ul></figure>'
    )


def range_chart(title: str, low: Curve, high: Curve, points: int) -> str:
    """Return a small figure of the range between two curves over the optimizer steps.

    Args:
        title: caption.
        low: lower end, with a point.
        high: upper end.
        points: at most so many are drawn of each end.
    """
    low, high = thinned(low, points), thinned(high, points)
    x = step_axis([low, high], 2, _SMALL_WIDTH - 2)
    y = value_axis([*low.finite(), *high.finite()], _SMALL_HEIGHT - 14, 4, may_be_log=False)
    backwards = Curve(low.steps[::-1], low.values[::-1])
    area = path(high, x, y) + path(backwards, x, y).replace("M", "L", 1) + "Z"
    zero = ""
    if y.low < 0 < y.high:
        zero = f'<path class="zero" d="M2 {y.place(0):.1f}H{_SMALL_WIDTH - 2:.0f}"/>'
    steps = (
        f'<text x="2" y="{_SMALL_HEIGHT - 2:.0f}">{low.steps[0]:,}</text>'
        f'<text x="{_SMALL_WIDTH - 2:.0f}" y="{_SMALL_HEIGHT - 2:.0f}" text-anchor="end">'
        f"{low.steps[-1]:,}</text>"
    )
    limits = f"{number(low.last, 3)} to {number(high.last, 3)}"
    return (
        f'<figure class="small"><figcaption>{escape(title)}<small>{limits}</small></figcaption>'
        f'<svg viewBox="0 0 {_SMALL_WIDTH:.0f} {_SMALL_HEIGHT:.0f}" role="img" '
        f'aria-label="range of {escape(title)}, at last {limits}">'
        f'<path class="band" d="{area}"/>{zero}'
        f'<path class="line c0" d="{path(high, x, y)}"/><path class="line c0" '
        f'd="{path(low, x, y)}"/>{steps}</svg></figure>'
    )


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    for value in y.ticks():
        place = y.place(value)
        parts.append(
            f'<path class="grid" d="M{_LEFT:.0f} {place:.1f}H{x.end:.0f}"/>'
            f'<text x="{_LEFT - 6:.0f}" y="{place + 4:.1f}" text-anchor="end">'
            f"{number(value)}</text>"
        )
    for value in x.ticks(int(x.end // 90)):
        if value == int(value):
            parts.append(
                f'<text x="{x.place(value):.1f}" y="{_HEIGHT - 18:.0f}" text-anchor="middle">'
                f"{value:,.0f}</text>"
            )
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 4:.0f}" text-anchor="middle">optimizer steps</text>'
    )
    return "".join(parts)


def _mark(step: int | None, x: Axis) -> str:
    if step is None:
        return ""
    return (
        f'<g><title>best, at step {step:,}</title><path class="zero" '
        f'd="M{x.place(step):.1f} {_TOP:.0f}V{_HEIGHT - _BOTTOM:.0f}"/></g>'
    )


def _line(label: str, curve: Curve, color: str, x: Axis, y: Axis) -> str:
    raw = path(thinned(curve, _RAW_POINTS), x, y)
    parts = [f'<path class="line {color}{" faint" if _is_long(curve) else ""}" d="{raw}"/>']
    if _is_long(curve):
        mean = path(smoothed(curve, _SMOOTH_POINTS), x, y)
        parts.append(f'<path class="line {color}" d="{mean}"/>')
    elif len(curve.steps) <= _DOTS_UP_TO:
        parts += [
            f'<circle class="{color}" cx="{x.place(step):.1f}" cy="{y.place(value):.1f}" r="3">'
            f"<title>{escape(label)}: {number(value)} at step {step:,}</title></circle>"
            for step, value in zip(curve.steps, curve.values, strict=True)
            if math.isfinite(value)
        ]
    return f"<g><title>{escape(label)}</title>{''.join(parts)}</g>"


def _legend_entry(label: str, curve: Curve, color: str) -> str:
    value = curve.recent_mean() if _is_long(curve) else curve.last
    missing = len(curve.values) - len(curve.finite())
    gap = f", {missing:,} not finite" if missing else ""
    return f'<li><span class="key {color}"></span>{escape(label)} <b>{number(value)}</b>{gap}</li>'


def _remarks(lines: Mapping[str, Curve], y: Axis) -> str:
    remarks = ["logarithmic axis"] if y.is_log else []
    if any(map(_is_long, lines.values())):
        remarks.append("bold: means of neighboring steps; numbers: mean of the last tenth")
    return f"<small>{'; '.join(remarks)}</small>" if remarks else ""


def _is_long(curve: Curve) -> bool:
    return len(curve.steps) >= _SMOOTH_FROM
