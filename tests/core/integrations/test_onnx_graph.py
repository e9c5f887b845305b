"""Attention of quantized queries and keys in ONNX: integers meet in a product of matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from compression_manager import deploy
from compression_manager.deploy import formats
from compression_manager.quantization import QuantizableAttention
from compression_plugins import LayerRule
from quantization_reference import trained

SKIPPED = (LayerRule(module_class="QuantizableAttention", skip=True),)


class Attention(nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.attention, self.options = QuantizableAttention(), options

    def forward(self, input: Tensor) -> Tensor:
        heads = (
            layer(input).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        result: Tensor = self.attention(*heads, **self.options)
        return result.transpose(1, 2).flatten(2)


def exported(
    tmp_path: Path, options: dict[str, Any], **config: Any
) -> tuple[nn.Module, onnx.ModelProto, Callable[..., Any]]:
    torch.manual_seed(0)
    inputs = torch.randn(4, 6, 16)
    converted = trained(Attention(options), inputs, **config).convert(inputs)
    deploy.export(converted, tmp_path / "a.onnx", "onnx", inputs)
    run = formats.FORMATS["onnx"].load(tmp_path / "a.onnx", int8=False)
    return converted, onnx.load(tmp_path / "a.onnx"), run


def integers_meet(model: onnx.ModelProto) -> bool:
    """Whether some MatMul multiplies two dequantized activations, moved at most."""
    made_by = {name: node for node in model.graph.node for name in node.output}

    def comes_from_integers(name: str) -> bool:
        node = made_by.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape"):
            node = made_by.get(node.input[0])
        quantizer = None if node is None else made_by.get(node.input[0])
        return quantizer is not None and quantizer.op_type == "QuantizeLinear"

    return any(
        node.op_type == "MatMul" and all(map(comes_from_integers, node.input))
        for node in model.graph.node
    )


@pytest.mark.parametrize("scale", [None, 0.25])
def test_the_scores_of_quantized_attention_are_products_of_integers(
    scale: float | None, tmp_path: Path
) -> None:
    converted, model, run = exported(tmp_path, {"scale": scale})
    assert integers_meet(model)
    for size in (1, 3):
        inputs = torch.randn(size, 6, 16)
        torch.testing.assert_close(run(inputs), converted(inputs), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"is_causal": True}, {}),
        ({"attn_mask": torch.eye(6, dtype=torch.bool)}, {}),
        ({}, {"overrides": SKIPPED}),
    ],
    ids=["causal", "mask", "float"],
)
def test_all_other_attention_is_left_to_the_exporter(
    options: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    converted, model, run = exported(tmp_path, options, **config)
    assert not integers_meet(model)
    inputs = torch.randn(3, 6, 16)
    torch.testing.assert_close(run(inputs), converted(inputs), rtol=0, atol=1e-2)
