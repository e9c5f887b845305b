"""What is not quantized, in bfloat16, where a user asks OpenVINO for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import deploy
from compression_manager.deploy.routes import find_routes
from compression_manager.errors import ConfigError
from compression_manager.quantization.integer.cpu_features import cpu_features
from quantization_reference import trained

VECTORS = toys.vectors().tensors[0]


class Attending(nn.Module):
    """Quantized layers around attention, which is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.into(x).unflatten(1, (1, 8, 8))
        attended = F.scaled_dot_product_attention(heads, heads, heads)
        output: torch.Tensor = self.out(attended.flatten(1))
        return output


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    return trained(Attending(), VECTORS).convert()


@pytest.fixture(scope="module")
def path(converted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("openvino") / "model.xml"
    return deploy.export(converted, file, "openvino", VECTORS).path


def test_bfloat16_for_what_is_not_quantized(converted: nn.Module, path: Path) -> None:
    exact, rounded = (deploy.load_exported(path, bfloat16=chosen) for chosen in (False, True))
    with torch.no_grad():
        expected = converted(VECTORS)
    torch.testing.assert_close(exact(VECTORS), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rounded(VECTORS), expected, rtol=0.05, atol=0.05)
    features = cpu_features()
    assert torch.equal(exact(VECTORS), rounded(VECTORS)) != (features.amx or features.bfloat16)


def test_bfloat16_is_openvinos_and_measured_by_name_only(
    converted: nn.Module, tmp_path: Path
) -> None:
    path = deploy.export(converted, tmp_path / "model.onnx", "onnx", VECTORS).path
    with pytest.raises(ConfigError, match=r"format 'onnx'.*export as 'openvino'"):
        deploy.load_exported(path, bfloat16=True)
    named = deploy.fastest(converted, VECTORS, routes=["openvino_bfloat16"], rounds=1)
    assert [row.route for row in named.results] == ["eager", "openvino_bfloat16"]
    assert named.results[1].milliseconds is not None
    assert "openvino_bfloat16" not in [route.name for route in find_routes(None, VECTORS)]


def test_bfloat16_is_asked_for_where_the_processor_has_none(
    converted: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_model, hints = openvino.Core.compile_model, []

    def compile(core: openvino.Core, network: Any, device: str, settings: dict[str, Any]) -> Any:
        hints.append(settings["INFERENCE_PRECISION_HINT"])
        return compile_model(core, network, device, settings)

    monkeypatch.setattr(openvino.Core, "compile_model", compile)
    for bfloat16 in (False, True):
        deploy.load_exported(path, bfloat16=bfloat16)
    deploy.fastest(converted, VECTORS, routes=["openvino", "openvino_bfloat16"], rounds=1)
    assert hints == ["f32", "bf16", "f32", "bf16"]
