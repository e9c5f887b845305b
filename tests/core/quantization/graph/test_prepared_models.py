"""`manager.graph` and the graphs of converted models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager import ConfigError, LifecycleError, prepare_compression
from compression_manager.quantization import QuantizationGraph, QuantizationScheme
from compression_plugins import QATConfig
from toys import ConvNet, assert_identical, images, loader, mlp, train, vectors


def kinds(graph: QuantizationGraph) -> list[str]:
    return [item.kind for item in graph if item.kind not in ("Parameter", "Buffer")]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def test_before_training_the_input_has_no_scale() -> None:
    manager = prepare_compression(mlp(), [QATConfig()])
    graph = manager.graph(torch.randn(3, 6))
    lines = str(graph).splitlines()
    assert lines[1] == (
        "t1 = FakeQuantize(t0, bits=8, scale=auto, zero_point=0, symmetric=False, signed=False) : "
        "Float32 [3, 6]"
    )
    assert lines[2] == "t2 = Parameter(0.weight) : Float32 [8, 6]"
    assert lines[3].startswith("t3 = FakeQuantize(t2, bits=8, scale=0.0")
    assert lines[5] == "t5 = Linear(t1, t3, t4) : Float32 [3, 8]"
    layer = ["FakeQuantize", "FakeQuantize", "Linear"]
    assert kinds(graph) == ["Input", *layer, "Relu", *layer]
    graph.validate()
    manager.close()


def test_after_training_the_scales_are_those_of_the_quantizers() -> None:
    model = ConvNet()
    batches = loader(images())
    manager = prepare_compression(model, [QATConfig()])
    train(manager, batches, sgd(model), 1)
    graph = manager.graph()
    graph.validate()
    assert kinds(graph) == [
        "Input",
        *["FakeQuantize", "FakeQuantize", "Conv2d", "BatchNorm2d", "Relu"] * 2,
        "Flatten",
        *["FakeQuantize", "FakeQuantize", "Linear"],
    ]
    inputs, weights = graph.fake_quantize_ops[0::2], graph.fake_quantize_ops[1::2]
    for layer, input_op, weight_op in zip(
        (model.conv1, model.conv2, model.fc), inputs, weights, strict=True
    ):
        assert input_op.scale == pytest.approx(layer.input_quantizer.scale.item())
        assert input_op.zero_point == layer.input_quantizer.zero_point.item()
        largest = layer.weight.detach().flatten(1).abs().amax(1)
        torch.testing.assert_close(weight_op.scale, largest / 127)
        assert (weight_op.axis, weight_op.zero_point.tolist()) == (0, [0] * len(largest))
    manager.close()


def test_the_line_after_a_quantizer_that_is_off_does_not_speak_for_others() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + x

    manager = prepare_compression(Skip(), [QATConfig()])
    lines = str(manager.graph(torch.randn(2, 6))).splitlines()
    assert lines[-2:] == [
        "t4 = Linear(t1, t3) : Float32 [2, 6]",
        "t5 = Add(t4, t0) : Float32 [2, 6]",
    ]
    manager.close()


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(symmetric=False, signed=False),
        QuantizationScheme(granularity="token", dynamic=True),
        None,
    ],
)
def test_a_converted_model(scheme: QuantizationScheme | None) -> None:
    model = mlp()
    manager = prepare_compression(model, [QATConfig(activation=scheme)])
    train(manager, loader(vectors()), sgd(model), 1)
    inputs = torch.randn(3, 6)
    prepared, converted = manager.graph(inputs), manager.convert(inputs)
    graph = QuantizationGraph.record(converted, inputs)
    graph.validate()
    quantized = [] if scheme is None else ["FakeQuantize"]
    layer = [*quantized, "Dequantize", "Linear"]
    assert kinds(graph) == ["Input", *layer, "Relu", *layer]
    if scheme is not None:
        input_lines = [str(item) for item in graph.fake_quantize_ops]
        trained = [str(item) for item in prepared.fake_quantize_ops[0::2]]
        assert [_numbers(line) for line in input_lines] == [_numbers(line) for line in trained]
    scale = model[0].weight.detach().abs().amax(1) / 127
    shown = f"scale={float(f'{scale.min():.3g}')!r}..{float(f'{scale.max():.3g}')!r}"
    assert f"{shown}, zero_point=0, axis=0) : Float32 [8, 6]" in str(graph)
    manager.close()


def _numbers(line: str) -> str:
    return line.split(", ", 1)[1]


def test_training_goes_on_as_without_the_listing() -> None:
    def run(*, listed: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = ConvNet(dropout=0.5)
        manager = prepare_compression(model, [QATConfig()])

        def after_step(epoch: int, step: int, loss: Tensor) -> None:
            if listed:
                manager.graph(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)))

        if listed:
            manager.graph(torch.ones(2, 1, 8, 8))
        train(manager, loader(images()), sgd(model), 1, after_step=after_step)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        folded = sorted(layer.name for layer in manager.report().layers if layer.bytes_after == 0)
        manager.close()
        return {"state": state, "folded": folded}

    assert_identical(run(listed=True), run(listed=False))


def test_the_input_given_at_prepare_is_the_default() -> None:
    manager = prepare_compression(mlp(), [QATConfig()], example_inputs=torch.randn(5, 6))
    assert manager.graph()[0].shape == (5, 6)
    assert manager.graph(torch.randn(7, 6))[0].shape == (7, 6)
    manager.close()


def test_without_any_input() -> None:
    manager = prepare_compression(mlp(), [QATConfig()])
    with pytest.raises(ConfigError, match="example_inputs"):
        manager.graph()
    manager.close()


def test_inputs_that_the_model_does_not_take() -> None:
    manager = prepare_compression(mlp(), [QATConfig()])
    with pytest.raises(ConfigError, match="example inputs"):
        manager.graph(torch.randn(3, 7))
    manager.close()


def test_after_closing() -> None:
    manager = prepare_compression(mlp(), [QATConfig()])
    manager.close()
    with pytest.raises(LifecycleError, match="graph"):
        manager.graph(torch.randn(3, 6))
