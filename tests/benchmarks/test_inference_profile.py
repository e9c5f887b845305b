"""Every kernel is counted once, in its own part, and the parts make the whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import inference_profile
from measuring.kernel_parts import (
    FLOATS,
    INTEGERS,
    KERNEL_PARTS,
    OTHERS,
    QUANTIZATION,
    part_of_event,
    part_of_node,
)


def _event(name: str, parent: Any = None) -> Any:
    return SimpleNamespace(name=name, cpu_parent=parent)


@pytest.mark.parametrize(
    ("event", "part"),
    [
        (_event("onednn::qlinear_pointwise"), INTEGERS),
        (_event("onednn::qconv2d_pointwise", _event("## Call CompiledFxGraph ##")), INTEGERS),
        (_event("aten::copy_", _event("aten::clone", _event("onednn::qconv_pointwise"))), INTEGERS),
        (_event("aoti_torch_cpu__qconv_pointwise_tensor"), INTEGERS),
        (_event("passes::convolve_integers"), INTEGERS),
        (_event("aten::mm", _event("passes::multiply_integers")), INTEGERS),
        (_event("aten::mkldnn_convolution"), FLOATS),
        (_event("aten::addmm", _event("aten::linear")), FLOATS),
        (_event("mkldnn::_linear_pointwise"), FLOATS),
        (_event("aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu"), FLOATS),
        (_event("aten::empty", _event("aten::_scaled_dot_product_flash_attention")), FLOATS),
        (_event("passes::quantize"), QUANTIZATION),
        (_event("cpp_fused_quantize_per_tensor_0"), QUANTIZATION),
        (_event("graph_2_cpp_fused_dequantize_per_tensor_transpose_view_10"), QUANTIZATION),
        (_event("graph_0_cpp_fused_mean_quantize_per_tensor_2"), OTHERS),
        (_event("graph_0_cpp_fused_transpose_view_3"), OTHERS),
        (_event("aten::native_layer_norm"), OTHERS),
        (_event("aoti_torch_cpu_gelu"), OTHERS),
        (_event("## Call CompiledFxGraph ##"), None),
        (_event("TorchDynamo Cache Lookup"), None),
    ],
)
def test_parts_of_events(event: Any, part: str | None) -> None:
    assert part_of_event(event) == part


@pytest.mark.parametrize(
    ("kind", "kernel", "multiplies", "part"),
    [
        ("Convolution", "brgconv_avx512_amx_I8", False, INTEGERS),
        ("FullyConnectedQuantizedLegacy", "brgemm_avx512_amx_i8", True, INTEGERS),
        ("FullyConnected", "brgemm_avx512_f32", True, FLOATS),
        ("Subgraph", "jit_avx512_i8", True, FLOATS),
        ("Subgraph", "jit_avx512_f32", False, OTHERS),
        ("Reorder", "jit_uni_I8", False, QUANTIZATION),
        ("FakeQuantize", "jit_avx512_f32", False, QUANTIZATION),
        ("MVN", "jit_avx512_f32", False, OTHERS),
    ],
)
def test_parts_of_nodes(kind: str, kernel: str, multiplies: bool, part: str) -> None:
    assert part_of_node(kind, kernel, multiplies=multiplies) == part


class _Compiled:
    """A network of one attention and one sum, whose counters are means over all calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: Any) -> None:
        self.calls += 1

    def create_infer_request(self) -> Any:
        return self

    def get_runtime_model(self) -> Any:
        names = SimpleNamespace(astype=lambda kind: "softmax,matmul")
        notes = {"originalLayersNames": names}
        node = SimpleNamespace(get_friendly_name=lambda: "fused", get_rt_info=lambda: notes)
        return SimpleNamespace(get_ops=lambda: [node])

    @property
    def profiling_info(self) -> list[Any]:
        # The first calls take ten times as long.
        slow = min(self.calls, inference_profile.WARM_UP)
        mean = (10 * slow + (self.calls - slow)) / self.calls / 1e6
        took = SimpleNamespace(total_seconds=lambda: mean)
        return [
            SimpleNamespace(node_name=name, node_type=kind, exec_type="jit_f32", real_time=took)
            for name, kind in (("fused", "Subgraph"), ("sum", "Add"))
        ]


def test_counters_are_of_the_measured_calls_alone() -> None:
    product = SimpleNamespace(get_friendly_name=lambda: "matmul", get_type_name=lambda: "MatMul")
    network, compiled = SimpleNamespace(get_ops=lambda: [product]), _Compiled()
    parts = inference_profile.openvino_parts(network, compiled, compiled, torch.ones(1), 4)
    assert parts[FLOATS] == pytest.approx(1e-3)
    assert parts[OTHERS] == pytest.approx(1e-3)
    assert compiled.calls == inference_profile.WARM_UP + 4


def test_the_median_is_one_of_the_samples() -> None:
    samples = [{"all": value, "rest": -value} for value in (9.0, 1.0, 5.0, 30.0)]
    assert inference_profile.median(samples) == {"all": 5.0, "rest": -5.0}


def test_operations_are_those_of_the_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(80, 7))
    expected = 2 * (2 * 16 * 5) * 27 + 2 * (2 * 7) * 80
    assert inference_profile.operations_of_layers(model, torch.ones(2, 3, 4, 4)) == expected


def test_the_finding_bounds_the_fastest_route_on_integers() -> None:
    def entry(title: str, everything: float, integers: float) -> dict[str, Any]:
        parts = {"all": everything, INTEGERS: integers}
        return {"title": title, "skipped": None, "parts": parts}

    entries = [
        entry("float32, eager", 70.0, 0.0),
        entry("int8, eager", 20.0, 5.0),
        entry("int8, OpenVINO", 10.0, 3.5),
        entry("float32, Inductor", 9.0, 0.0),
        {"title": "int8, AOTInductor", "skipped": "no compiler"},
    ]
    assert inference_profile.finding("resnet", entries, 7 * 10**9) == (
        "resnet: the fastest is int8, OpenVINO, with 7.0 times float32's speed. Products of "
        "integers take 35% of its time, 2000 * 10^9 operations a second. With nothing but these it "
        "would have 20.0 times float32's speed, with all but these 10.8 times. The bar of 18 is "
        "3.9 ms."
    )
    assert "no route multiplies" in inference_profile.finding("resnet", entries[:1], 1)


def _run(routes: list[str], path: Path) -> dict[str, dict[str, float]]:
    before = torch.get_num_threads()
    arguments = ["--models", "encoder", "--shrink", "8", "--blocks", "1", "--batches", "2"]
    arguments += ["--threads", "1", "--json", str(path), "--routes", *routes]
    try:
        document = inference_profile.main(arguments)
    finally:
        torch.set_num_threads(before)
    assert json.loads(path.read_text()) == document
    return {item["route"]: item["parts"] for item in document["results"]}


def test_the_parts_make_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _run(["int8-eager"], tmp_path / "profile.json")
    assert list(found) == ["float32", "int8-eager"]
    for parts in found.values():
        assert sum(parts[name] for name in inference_profile.PARTS) == pytest.approx(parts["all"])
        assert all(value >= 0 for value in parts.values())
    assert found["float32"][INTEGERS] == found["float32"][QUANTIZATION] == 0
    assert found["float32"][FLOATS] > 0
    assert "starts and rest" in capsys.readouterr().out


def test_what_calls_no_operator_is_seen(tmp_path: Path) -> None:
    parts = _run(["int8-eager"], tmp_path / "profile.json")["int8-eager"]
    assert parts[INTEGERS] > 0
    assert parts[QUANTIZATION] > 0


@pytest.mark.slow
def test_kernels_that_inductor_generates_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(inference_profile, "part_of_event", lambda event: names.append(event.name))
    _run(["int8-inductor"], tmp_path / "profile.json")
    assert any("cpp_fused_native_layer_norm_quantize_per_tensor" in name for name in names)


def test_openvino_counts_products_of_integers_and_attention(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    parts = _run(["int8-openvino"], tmp_path / "profile.json")["int8-openvino"]
    assert all(parts[name] > 0 for name in (INTEGERS, FLOATS, OTHERS))
    assert sum(parts[name] for name in KERNEL_PARTS) <= parts["all"]


def test_a_route_that_fails_is_listed_with_the_reason() -> None:
    def refuse(model: Any, inputs: Any) -> Any:
        raise ImportError("no such engine\nmore lines")

    route = inference_profile.Route("broken", "broken", refuse)
    subject = inference_profile.subject_of(inference_profile.WORKLOADS["encoder"](8))
    (entry,) = inference_profile.measure(subject, [route], 1, 1)
    assert entry["skipped"] == "ImportError: no such engine"
    assert inference_profile._line(entry).endswith("skipped: ImportError: no such engine")
