"""The benchmark of inference runs, and its figures are those of what it timed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import inference
from inference import Result, Route
from measuring.timing import Duration

EAGER = next(route for route in inference.ROUTES if route.name == "int8-eager")


def test_every_figure_is_shown_and_written(tmp_path, capsys):
    path, image = tmp_path / "inference.json", tmp_path / "inference.png"
    before = torch.get_num_threads()
    arguments = ["--models", "resnet", "--routes", "int8-eager", "--runs", "3", "--shrink", "8"]
    arguments += ["--threads", "1", "--json", str(path), "--chart", str(image)]
    try:
        baseline, eager = inference.main(arguments)
    finally:
        torch.set_num_threads(before)
    assert (baseline.speed_up, baseline.error, baseline.runs) == (1, 0, 3)
    assert (eager.error, eager.is_right) == (0, True)
    document = json.loads(path.read_text())
    assert [item["route"] for item in document["results"]] == ["float32", "int8-eager"]
    shown = capsys.readouterr().out
    assert str(eager) in shown
    assert f"resnet: the best route is int8, eager, {eager.speed_up:.2f} times" in shown
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_symmetric_model_has_no_zero_points_and_quantizes_attention():
    subject = inference.subject_of(inference.WORKLOADS["encoder"](8))
    kinds, zero_points = [], []
    for model in (subject.float_model, subject.converted, subject.symmetric):
        kinds.append({type(module).__name__ for module in model.modules()})
        found = [b for name, b in model.named_buffers() if name.endswith("input_zero_point")]
        zero_points.append(any(bool(zero_point.any()) for zero_point in found))
    assert [{"ConvertedAttention", "QuantizableAttention"} & kind for kind in kinds] == [
        set(), set(), {"ConvertedAttention"},
    ]  # fmt: skip
    assert zero_points == [False, True, False]


def test_speed_ups_are_over_float32_of_the_same_round():
    durations = {
        "float32": [Duration(0.4, 1), Duration(0.6, 1)],
        "int8-eager": [Duration(0.1, 1), Duration(0.3, 1)],
    }
    result = inference._result("resnet", EAGER, durations, 0.0)
    assert result.speed_up == pytest.approx(3)
    assert result.milliseconds == pytest.approx(200)


def test_a_route_that_fails_is_listed_with_the_reason():
    def refuse(model, inputs):
        raise ImportError("no such engine\nmore lines")

    routes = [inference.ROUTES[0], Route("broken", "broken", refuse)]
    workload = inference.WORKLOADS["encoder"](8)
    results = inference.measure(workload, routes, 2, None)
    assert results[1].skipped == "ImportError: no such engine"
    assert "skipped: ImportError: no such engine" in str(results[1])


def test_a_route_with_another_output_is_no_candidate():
    right = Result("resnet", "int8-eager", "int8, eager", 2.0, (2.0, 2.0), 1.0, 1e-7, 3)
    wrong = dataclasses.replace(right, route="int8-openvino", speed_up=50.0, error=0.3)
    in_float = dataclasses.replace(right, route="float32", speed_up=9.0, error=0.0)
    assert inference.best([right, wrong, in_float]) == right
    assert str(wrong).endswith("wrong output")
    assert inference.best([wrong]) is None
    assert inference.verdict("resnet", [right, wrong]).endswith("misses the bar of 18")


def test_the_error_is_relative():
    expected = torch.tensor([3.0, 4.0])
    assert inference.relative_error(expected * 1.1, expected) == pytest.approx(0.1)
    assert inference.relative_error([expected.numpy()], expected) == 0
