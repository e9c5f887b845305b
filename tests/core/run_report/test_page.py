"""The page of runs that are larger than a test can train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from compression_manager.run_report.curve import Curve
from compression_manager.run_report.page import render
from compression_manager.run_report.run import Range, Run
from compression_manager.run_report.text import duration, number, size
from written_runs import Page

STEPS = tuple(range(1, 20_001))


def _run(**others: Any) -> Run:
    plain: dict[str, Any] = dict.fromkeys(
        ["checkpoint", "events", "checkpoint_step", "stop_reason", "seconds"]
    )
    plain |= {name: {} for name in ("recipe", "environment", "notes", "curves", "ranges")}
    plain |= {"folder": Path("run"), "global_step": 20_000, "evaluations": [], "layers": []}
    return Run(**{**plain, **others})


def _layer(name: str) -> dict[str, Any]:
    quantizer = {
        "part": "",
        "role": "weight",
        "scheme": "int8 symmetric per channel (axis 0)",
        "bits": 8,
        "observing": False,
        "quantizing": True,
        "shape": [768, 768],
        "scale": [0.001, 0.002],
        "zero_point": [0, 0],
        "range": [-0.254, 0.254],
        "sqnr_db": "inf",
        "problem": None,
    }
    return {
        "name": name,
        "kind": "Linear",
        "quantized": True,
        "detail": "weight int8 symmetric per channel (axis 0), input uint8 affine per tensor",
        "bytes_before": 2_362_368,
        "bytes_after": 595_968,
        "quantizers": [quantizer, {**quantizer, "role": "input", "shape": None}],
    }


def test_page_of_a_large_run_stays_below_a_megabyte() -> None:
    names = [f"encoder.layers.{index}.linear" for index in range(250)]
    curve = Curve(STEPS, tuple(math.sin(step) + 2 for step in STEPS))
    few = Curve(STEPS[::100], curve.values[::100])
    text = render(
        _run(
            layers=[_layer(name) for name in names],
            curves={f"loss/term-{index}": curve for index in range(6)},
            ranges={
                f"quantization/{name}/{role}": Range(few, few)
                for name in names
                for role in ("weight", "input")
            },
            evaluations=[
                {"epoch": epoch, "global_step": 100 * epoch, "metrics": {"accuracy": 0.5}}
                for epoch in range(200)
            ],
        )
    )
    assert len(text) < 1_000_000
    page = Page(text)
    assert all(name in page.texts for name in names)
    assert any("The first 300 of 500." in item for item in page.texts)


def test_empty_run_says_what_is_missing() -> None:
    page = Page(render(_run()))
    for title in ("Loss terms", "Layers", "Recipe", "Environment"):
        assert page.after(title).startswith("Not recorded"), title


def test_every_curve_has_a_place() -> None:
    curve = Curve((1, 2), (1.0, 2.0))
    tags = ["learning_rate", "third_party/sparsity", "quantization/fc/weight/scale"]
    ranges = {"quantization/fc/weight": Range(curve, curve)}
    page = Page(render(_run(curves=dict.fromkeys(tags, curve), ranges=ranges)))
    assert {"learning_rate", "third_party/sparsity", "fc/weight"} <= set(page.texts)
    # The scale is what the range is made from.
    assert "quantization/fc/weight/scale" not in page.texts
    page = Page(render(_run(curves=dict.fromkeys(tags, curve))))
    assert "quantization/fc/weight/scale" in page.texts


def test_run_that_went_on_after_its_checkpoint() -> None:
    page = Page(render(_run(checkpoint_step=19_000, stop_reason="no better", seconds=75.0)))
    text = page.texts[page.texts.index("Optimizer steps") + 2]
    assert text == "in 1 min 15 s; newest checkpoint at 19,000; stopped: no better"


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_best_of_equals_is_the_first_and_nan_never(lower_is_better: bool) -> None:
    values = ["nan", 2.0, 1.0, 2.0, 1.0]
    evaluations = [
        {"global_step": step, "metrics": {"m": value}} for step, value in enumerate(values)
    ]
    options = {"metric": "m", "lower_is_better": lower_is_better}
    run = _run(recipe={"plugins": {"mine": options}}, evaluations=evaluations)
    assert run.best is evaluations[2 if lower_is_better else 1]
    assert _run(evaluations=evaluations).best is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        (1e-7, "1e-07"),
        ("nan", "nan"),
        (8.0, "8"),
    ],
)
def test_numbers(value: float | str, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_362_368, "2.36 MB"), (5 * 10**12, "5e+03 GB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (75, "1 min 15 s"), (7265, "2 h 1 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
