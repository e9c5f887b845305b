"""The layers of a run: a row for each, which opens to show its quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from compression_manager.run_report.run import Run
from compression_manager.run_report.text import number, remark, size, table

_HEADER = ("layer", "kind", "weight", "input", "size", "before", "after", "weight SQNR")
_DASH = "\N{EN DASH}"


def layers_section(run: Run) -> str:
    """Return the table of all layers, or why there is none."""
    if not run.layers:
        return remark(
            "Not recorded: they are part of the checkpoints that the checkpoint plugin writes."
        )
    largest = max(layer["bytes_before"] for layer in run.layers) or 1
    head = "".join(f"<span>{name}</span>" for name in _HEADER)
    rows = "\n".join(_layer(layer, largest) for layer in run.layers)
    before, after = run.bytes or (0, 0)
    total = _cells(["total", "", "", "", "", size(before), size(after), ""])
    explained = remark(
        "Bits of weight and input; bytes of the float layer and of the converted one; "
        "signal-to-quantization-noise ratio of the weight in decibels. A row opens."
    )
    return (
        f'{explained}<div class="layers"><div class="row head">{head}</div>\n{rows}\n'
        f'<div class="row total">{total}</div></div>'
    )


def _layer(layer: Mapping[str, Any], largest: int) -> str:
    quantizers = layer["quantizers"]
    state = "" if layer["quantized"] else " float"
    cells = _cells(
        [
            layer["name"] or "(the model)",
            layer["kind"],
            _bits(layer, "weight"),
            _bits(layer, "input"),
        ]
    )
    cells += _bar(layer, largest)
    cells += _cells([size(layer["bytes_before"]), size(layer["bytes_after"]), _noise(quantizers)])
    inside = remark(layer["detail"])
    if quantizers:
        inside += table(
            ("tensor", "scheme", "shape", "scale", "zero point", "range", "SQNR dB", "state"),
            [_quantizer(item) for item in quantizers],
        )
    return (
        f'<details><summary class="row{state}">{cells}</summary>'
        f'<div class="inside">{inside}</div></details>'
    )


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<span>{escape(text)}</span>" for text in texts)


def _bits(layer: Mapping[str, Any], role: str) -> str:
    found = {item["bits"] for item in layer["quantizers"] if item["role"] == role}
    return ", ".join(map(str, sorted(found))) if found and layer["quantized"] else "float"


def _noise(quantizers: Sequence[Mapping[str, Any]]) -> str:
    """Return the lowest ratio of the layer's weights."""
    found = [float(item["sqnr_db"]) for item in quantizers if item["sqnr_db"] is not None]
    return f"{min(found):.1f} dB" if found else _DASH


def _bar(layer: Mapping[str, Any], largest: int) -> str:
    before, after = layer["bytes_before"], layer["bytes_after"]
    width = 100 * before / largest
    inner = min(100.0, 100 * after / before) if before else 0.0
    return (
        f'<span><span class="bar" style="width:{width:.1f}%;display:block">'
        f'<i style="width:{inner:.1f}%"></i></span></span>'
    )


def _quantizer(item: Mapping[str, Any]) -> list[str]:
    shape = item["shape"]
    return [
        " ".join(filter(None, (item["part"], item["role"]))),
        item["scheme"],
        _DASH if shape is None else " \N{MULTIPLICATION SIGN} ".join(map(str, shape)),
        _interval(item["scale"]),
        _interval(item["zero_point"]),
        _interval(item["range"], digits=3),
        _DASH if item["sqnr_db"] is None else f"{float(item['sqnr_db']):.1f}",
        item["problem"] or _phase(item),
    ]


def _interval(limits: Sequence[float | str] | None, digits: int = 4) -> str:
    if limits is None:
        return _DASH
    low, high = (number(limit, digits) for limit in limits)
    return low if low == high else f"{low} to {high}"


def _phase(item: Mapping[str, Any]) -> str:
    states = [name for name in ("observing", "quantizing") if item[name]]
    return ", ".join(states) or "off"
