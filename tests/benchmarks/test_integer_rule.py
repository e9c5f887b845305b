"""The benchmark of the rule times both paths and tells right from wrong; figures are not tested."""

from __future__ import annotations

import json
from typing import Any

import pytest

import integer_rule
from compression_manager.quantization.integer import rule
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.selection import TORCH, use_passes
from compression_manager.quantization.layers import products
from integer_layers import pretended
from measuring.timing import Duration


def _timed(integer: float, spread: float = 0.0) -> Any:
    """Return what takes the place of `interleaved`: four rounds, float32 in 1 second each."""
    times = [integer - spread, integer, integer, integer + spread]

    def interleaved(arms: Any, *args: Any, **options: Any) -> dict[str, list[Duration]]:
        return {
            "integer": [Duration(value, value) for value in times],
            "float32": [Duration(1.0, 1.0)] * 4,
        }

    return interleaved


def test_both_paths_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    decide = products.decide

    def watched(options: ProductOptions, *args: Any, **more: Any) -> Any:
        decision = decide(options, *args, **more)
        paths.append(decision.path)
        return decision

    monkeypatch.setattr(products, "decide", watched)
    before = rule.why_no_integers
    for kind, shape in (("linear", (8, 16, 4)), ("convolution", (2, 4, 5))):
        paths.clear()
        result = integer_rule.measure(kind, shape, 3, 1.0)
        assert set(paths) == {"integer", "codes"}
        assert result.ratio > 0
    assert result.size == (100, 18, 4, 1)
    assert rule.why_no_integers is before


@pytest.mark.parametrize(
    ("integer", "spread", "vnni", "is_right"),
    [
        (0.5, 0.0, True, True),
        (1.04, 0.0, True, True),
        (1.5, 0.0, True, False),
        (1.5, 2.0, True, True),
        (1.5, 0.0, False, True),
        (0.5, 0.0, False, False),
        (0.5, 3.0, False, True),
    ],
)
def test_verdicts(
    integer: float, spread: float, vnni: bool, is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_rule, "interleaved", _timed(integer, spread))
    with pretended(monkeypatch, vnni=vnni, amx=False), use_passes(TORCH):
        result = integer_rule.measure("linear", (512, 256, 256), 4, 1.0)
    assert result.chosen == ("integer" if vnni else "float32")
    assert result.is_right == is_right
    loss = integer if vnni else 1 / integer
    assert f"{loss:.2f} times" in integer_rule.summary([result])


def test_every_shape_is_written(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_rule, "SIDES", ((16, 4),))
    monkeypatch.setattr(integer_rule, "CONVOLUTIONS", ((2, 4, 5),))
    path = tmp_path / "rule.json"
    arguments = ["--rows", "4", "8", "--rounds", "3", "--threads", "1", "--json", str(path)]
    integer_rule.main(arguments)
    written = json.loads(path.read_text())
    assert [item["size"][0] for item in written["results"]] == [4, 8, 100]
    assert written["summary"] in capsys.readouterr().out
