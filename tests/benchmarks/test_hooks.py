"""The benchmark of the framework's own cost runs; fits and bookkeeping are right."""

from __future__ import annotations

import json

import pytest
import torch

import hooks
from measuring.empty_plugin import EmptyPlugin, manager_with
from measuring.fits import exponent, last_exponent, relative_growth


@pytest.mark.slow
def test_it_runs_and_reports(tmp_path, capsys):
    before = torch.get_num_threads()
    path = tmp_path / "hooks.json"
    arguments = ["--rounds", "2", "--steps", "20", "60", "--layers", "2", "8", "--shrink", "8"]
    try:
        found = hooks.main([*arguments, "--json", str(path)])
    finally:
        torch.set_num_threads(before)
    assert json.loads(path.read_text()) == found
    assert list(found["hooks"]) == ["0", "1", "5"]
    for spread in found["hooks"].values():
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert found["checkpoint"]["save_ms"] > 0
    # Float weights and momentum of an encoder whose width is 64, and scales.
    assert 0.2 < found["checkpoint"]["megabytes"] < 2
    assert list(found["steps"]["overhead_us"]) == ["20", "60"]
    assert list(found["layers"]["convert"]["ms"]) == ["2", "8"]
    assert f"5 plugins: {found['hooks']['5']['median']:.1f} us" in capsys.readouterr().out


def test_a_power_law_is_recognized():
    quadratic = {size: 3.0 * size**2 for size in (10, 100, 1000)}
    assert exponent(quadratic) == pytest.approx(2)
    bent = {10: 1.0, 100: 10.0, 1000: 1000.0}
    assert last_exponent(bent) == pytest.approx(2)
    assert exponent(bent) == pytest.approx(1.5)


def test_growth_is_that_of_the_fitted_line():
    assert relative_growth([0, 10, 20], [2, 3, 4]) == pytest.approx(1)
    assert relative_growth([0, 10, 20], [2, 2, 2]) == pytest.approx(0)


def test_one_disturbed_block_does_not_make_a_slope():
    values = [2.0, 2.1, 2.0, 2.1] * 10
    values[-1] = 100.0
    kept = hooks._without_outliers(values)
    assert kept[:-1] == values[:-1]
    assert kept[-1] < 2.5


def test_empty_plugins_are_called_in_every_hook_of_a_step():
    names = [name for name in vars(EmptyPlugin) if name.startswith("on_")]
    assert len(names) == 12
    manager = manager_with(2, torch.nn.Linear(2, 2))
    implementations = {
        name: [item.plugin_name for item in getattr(manager._hooks.relay, name).get_hookimpls()]
        for name in [*names, "consume_metrics"]
    }
    called = set(map(tuple, implementations.values()))
    assert called == {("empty1", "empty0")}


def test_what_the_hooks_cost_grows_with_the_plugins():
    found = hooks.hook_overhead(counts=(0, 20), rounds=5, steps=50)
    assert found["20"]["low"] > found["0"]["high"]
