"""The comparison with peers lists each of them, with a figure or the reason for having none."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from measuring.models import WORKLOADS
from measuring.timing import Duration
from peers import adapters, measure, run


class Rounded(nn.Module):
    """Stands for a peer's fake-quantized model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input):
        return 0.9 * self.inner(input)


@pytest.fixture
def _peers(monkeypatch):
    def refuse(model, inputs):
        raise ImportError("needs a library\nand more")

    training = {
        "good": lambda model, inputs: Rounded(model),
        "idle": lambda model, inputs: model,
        "absent": refuse,
    }
    inference = {
        "good": lambda model, inputs: Rounded(model),
        "idle": lambda model, inputs: model,
        "absent": refuse,
    }
    monkeypatch.setattr(adapters, "TRAINING", training)
    monkeypatch.setattr(adapters, "INFERENCE", inference)


@pytest.mark.usefixtures("_peers")
def test_peers_take_turns_with_float32_and_failures_have_a_reason():
    workload = WORKLOADS["resnet"](8)
    found = measure.measure("training", workload, ["good", "idle", "absent", measure.OURS], 3, None)
    baseline, good, idle, absent, ours = found
    assert (baseline["value"], baseline["rounds"]) == (1, 3)
    assert good["quartiles"][0] <= good["value"] <= good["quartiles"][1]
    assert idle["failed"].endswith("it quantizes nothing: its output is that of the float model")
    assert absent["failed"] == "ImportError: needs a library"
    assert ours["value"] > 0
    assert "failed: ImportError: needs a library" in measure.describe(absent)


@pytest.mark.usefixtures("_peers")
def test_inference_says_how_far_the_output_is_from_float(tmp_path):
    own = f"{measure.OURS}: int8, eager"
    before, path = torch.get_num_threads(), tmp_path / "found.json"
    arguments = ["--inference", "good", own, "idle", "--models", "encoder", "--shrink", "8"]
    try:
        found = measure.main([*arguments, "--rounds", "2", "--threads", "1", "--json", str(path)])
    finally:
        torch.set_num_threads(before)
    assert found[1]["error"] == pytest.approx(0.1)
    assert 0 < found[2]["error"] < 0.1
    assert found[3]["failed"].endswith("its output is that of the float model")
    names = [entry["peer"] for entry in json.loads(path.read_text())]
    assert names == ["float32", "good", own, "idle"]


def test_a_speed_up_is_the_inverse_of_a_ratio(monkeypatch):
    twice = {"float32": [Duration(2.0, 0)], "peer": [Duration(1.0, 0)]}
    monkeypatch.setattr(measure, "interleaved", lambda *args, **options: twice)
    monkeypatch.setattr(measure, "training_arms", lambda *args: ({}, {}))
    monkeypatch.setattr(measure, "inference_arms", lambda *args: ({}, {}))
    workload = WORKLOADS["encoder"](8)
    values = [
        measure.measure(what, workload, ["peer"], 1, None)[1]["value"]
        for what in ("training", "inference")
    ]
    assert values == [0.5, 2.0]


def test_every_peer_of_an_environment_that_cannot_be_built_is_listed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "build", lambda environment, folder: "ERROR: no such distribution")
    path = tmp_path / "peers.json"
    arguments = ["--folder", str(tmp_path), "--json", str(path), "--environments", "brevitas"]
    found = run.main(arguments)
    assert {(entry["peer"], entry["model"]) for entry in found} == {
        (peer, model) for peer in (run.OURS, "Brevitas") for model in ("encoder", "resnet")
    }
    shown = capsys.readouterr().out
    assert "Brevitas, resnet: ERROR: no such distribution" in shown
    assert json.loads(path.read_text())["results"] == found


def test_the_reason_for_which_pip_refuses_is_kept(tmp_path, monkeypatch):
    environment = run.Environment("none", ("no-such-file.whl",))
    monkeypatch.setattr(run.venv, "create", lambda path, **options: path.mkdir())
    answers = [(0, ""), (1, "WARNING: odd\nERROR: no-such-file.whl is not there\n")]

    def pip(command, **options):
        status, text = answers.pop(0)
        return run.subprocess.CompletedProcess(command, status, "", text)

    monkeypatch.setattr(run.subprocess, "run", pip)
    assert run.build(environment, tmp_path) == "ERROR: no-such-file.whl is not there"
    assert not (tmp_path / "none" / ".installed").exists()


def test_every_peer_has_an_adapter_and_a_version():
    for environment in run.ENVIRONMENTS:
        assert {name for name in environment.training if name != run.OURS} <= set(adapters.TRAINING)
        others = {name for name in environment.inference if run.OURS not in name}
        assert others <= set(adapters.INFERENCE)
    assert set(adapters.DISTRIBUTIONS) == set(adapters.TRAINING) | set(adapters.INFERENCE)
