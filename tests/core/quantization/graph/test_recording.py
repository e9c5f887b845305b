"""Listing what a model runs, without leaving a trace in it."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager import ConfigError
from compression_manager.quantization import (
    FakeQuantizeOp,
    QuantizationGraph,
    QuantizationScheme,
    dequantize,
    fake_quantize,
    quantize,
)
from compression_manager.quantization.quantizers.dynamic_quantizer import fake_quantize_dynamically
from toys import ConvNet, assert_identical, mlp

LINE = re.compile(r"t\d+ = [A-Z]\w*\(.*\) : (Float32|Float64|Int64|Bool) \[[\d, ]*\]")


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def lines_of(function: Callable[..., Any], *inputs: Tensor) -> list[str]:
    """Without the lines of the inputs."""
    graph = QuantizationGraph.record(Lambda(function), inputs)
    graph.validate()
    return [str(item).split(" : ")[0] for item in graph if item.kind != "Input"]


def test_a_model_of_modules() -> None:
    graph = QuantizationGraph.record(mlp(), torch.randn(3, 6))
    assert str(graph).splitlines() == [
        "t0 = Input(input) : Float32 [3, 6]",
        "t1 = Parameter(0.weight) : Float32 [8, 6]",
        "t2 = Parameter(0.bias) : Float32 [8]",
        "t3 = Linear(t0, t1, t2) : Float32 [3, 8]",
        "t4 = Relu(t3) : Float32 [3, 8]",
        "t5 = Parameter(2.weight) : Float32 [4, 8]",
        "t6 = Parameter(2.bias) : Float32 [4]",
        "t7 = Linear(t4, t5, t6) : Float32 [3, 4]",
    ]
    assert graph.output_ids == (7,)
    graph.validate()


def test_a_linear_layer_alone_has_the_form_of_the_documentation() -> None:
    graph = QuantizationGraph.record(nn.Linear(6, 4, bias=False), torch.randn(3, 6))
    assert str(graph).splitlines()[-1] == "t2 = Linear(t0, t1) : Float32 [3, 4]"


def test_convolutions_and_functions() -> None:
    graph = QuantizationGraph.record(ConvNet(), torch.randn(2, 1, 8, 8))
    kinds = [item.kind for item in graph if item.kind not in ("Parameter", "Buffer")]
    assert kinds == [
        "Input",
        *["Conv2d", "BatchNorm2d", "Relu"] * 2,
        "Flatten",
        "Linear",
    ]
    assert all(LINE.fullmatch(line) for line in str(graph).splitlines())
    assert " = Buffer(bn1.running_mean) : Float32 [4]" in str(graph)
    graph.validate()


def test_recorded_attributes_are_those_of_the_layer() -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=2, groups=2)
    graph = QuantizationGraph.record(layer, torch.randn(1, 4, 9, 11))
    assert graph[len(graph) - 1].attributes == {
        "kernel_size": (3, 3),
        "stride": (2, 2),
        "padding": (1, 0),
        "dilation": (2, 2),
        "groups": 2,
    }
    graph.validate()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: x + y, ["t2 = Add(t0, t1)"]),
        (lambda x, y: torch.add(x, y), ["t2 = Add(t0, t1)"]),
        (lambda x, y: torch.add(x, y, alpha=2), ["t2 = Add(t0, t1)"]),
        (lambda x, y: x.clone().add_(y), ["t2 = Add(t0, t1)"]),
        (lambda x, y: 2 * x, ["t2 = Mul(t0, 2)"]),
        (lambda x, y: 1.5 - x, ["t2 = Sub(1.5, t0)"]),
        (lambda x, y: 1 / x, ["t2 = Div(1, t0)"]),
        (lambda x, y: x // 3, ["t2 = FloorDivide(t0, 3)"]),
        (lambda x, y: 2**x, ["t2 = Pow(2, t0)"]),
        (lambda x, y: x @ y.T, ["t2 = Transpose(t1)", "t3 = MatMul(t0, t2)"]),
        (lambda x, y: x.view(-1), ["t2 = Reshape(t0)"]),
        (lambda x, y: x.view_as(y), ["t2 = Reshape(t0)"]),
        (lambda x, y: x.flatten(), ["t2 = Flatten(t0)"]),
        (lambda x, y: torch.cat([x, y]), ["t2 = Concat(t0, t1)"]),
        (lambda x, y: x.chunk(3, 1)[2], ["t2 = Chunk(t0, output=2)"]),
        (lambda x, y: [*x], ["t2 = Unbind(t0, output=0)", "t3 = Unbind(t0, output=1)"]),
        (lambda x, y: x[0], ["t2 = Slice(t0)"]),
        (lambda x, y: x.double(), ["t2 = Cast(t0)"]),
        (lambda x, y: F.gelu(x), ["t2 = Gelu(t0)"]),
        (lambda x, y: F.leaky_relu(x), ["t2 = LeakyRelu(t0)"]),
        (lambda x, y: F.softmax(x, dim=-1), ["t2 = Softmax(t0)"]),
        (lambda x, y: x.softmax(-1), ["t2 = Softmax(t0)"]),
        (lambda x, y: torch.zeros(2), ["t2 = Zeros()"]),
        (lambda x, y: torch.ops.aten.mul.Tensor(x, y), ["t2 = Mul(t0, t1)"]),
        (lambda x, y: F.linear(bias=None, weight=y, input=x), ["t2 = Linear(t0, t1)"]),
    ],
)
def test_names_and_arguments(function: Callable[..., Any], expected: list[str]) -> None:
    assert lines_of(function, torch.randn(2, 3), torch.randn(2, 3)) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, training=False),
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float32),
        lambda x: x.detach().clone(),
        lambda x: (x.shape, x.dim(), x.is_contiguous(), x)[-1],
    ],
)
def test_what_computes_nothing_has_no_line(function: Callable[..., Any]) -> None:
    assert lines_of(lambda x: F.relu(function(x)), torch.randn(2, 3)) == ["t1 = Relu(t0)"]


def test_writing_in_place_gives_the_tensor_a_new_id() -> None:
    def forward(x: Tensor) -> Tensor:
        y = F.relu(x, inplace=True)
        y[0] = 1.0
        return y + 1

    assert lines_of(forward, torch.randn(2, 3)) == [
        "t1 = Relu(t0)",
        "t2 = SetSlice(t1)",
        "t3 = Add(t2, 1)",
    ]


def test_each_output_has_its_line_from_when_it_is_read() -> None:
    def forward(x: Tensor) -> Tensor:
        _unread, first, second = x.chunk(3, 1)
        x.add_(1)  # what was split off before keeps its source
        return second * first

    assert lines_of(forward, torch.randn(2, 3)) == [
        "t1 = Add(t0, 1)",
        "t2 = Chunk(t0, output=2)",
        "t3 = Chunk(t0, output=1)",
        "t4 = Mul(t2, t3)",
    ]


def test_tensors_from_outside_are_constants() -> None:
    constant = torch.ones(3)
    assert lines_of(lambda x: x + constant, torch.randn(2, 3)) == [
        "t1 = Constant()",
        "t2 = Add(t0, t1)",
    ]


def test_control_flow_that_export_cannot_trace_lists_the_path_taken() -> None:
    def forward(x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else -x

    assert lines_of(forward, torch.ones(2))[-1] == "t2 = Mul(t0, 2)"
    assert lines_of(forward, -torch.ones(2))[-1] == "t2 = Neg(t0)"


def test_autograd_functions_are_seen_through() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    assert lines_of(lambda x: F.relu(Double.apply(x)), torch.randn(2)) == [
        "t1 = Mul(t0, 2)",
        "t2 = Relu(t1)",
    ]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_modules_are_seen_through() -> None:
    layers = (nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(2, 3, 2))
    inner = torch.jit.script(nn.Sequential(*layers))
    graph = QuantizationGraph.record(nn.Sequential(inner, nn.ReLU()), torch.randn(1, 1, 7, 7))
    shown = [item.kind for item in graph if item.kind not in ("Input", "Parameter")]
    assert shown == ["Conv2d", "Relu", "ConvTranspose2d", "Relu"]
    graph.validate()


def test_transposed_convolution() -> None:
    layer = nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2)
    graph = QuantizationGraph.record(layer, torch.randn(1, 2, 4, 4))
    assert str(graph).splitlines()[-1] == "t3 = ConvTranspose2d(t0, t1, t2) : Float32 [1, 4, 9, 9]"
    graph.validate()


def test_fused_paths_do_not_hide_the_layers() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    graph = QuantizationGraph.record(encoder, torch.randn(2, 3, 8))
    kinds = [item.kind for item in graph]
    assert kinds.count("Linear") == 2
    assert kinds.count("LayerNorm") == 2
    graph.validate()


def test_inputs_are_named() -> None:
    def forward(ids: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": ids + mask}

    model = nn.Module()
    model.forward = forward  # type: ignore[method-assign]  # on this object alone
    graph = QuantizationGraph.record(model, {"mask": torch.ones(2), "ids": torch.zeros(2)})
    assert [str(item).split(" : ")[0] for item in graph] == [
        "t0 = Input(mask)",
        "t1 = Input(ids)",
        "t2 = Add(t1, t0)",
    ]
    pair = QuantizationGraph.record(Lambda(torch.add), (torch.ones(2), torch.ones(2)))
    assert [item.arguments() for item in pair][:2] == ["input_0", "input_1"]


def test_several_outputs() -> None:
    graph = QuantizationGraph.record(Lambda(lambda x: {"a": x + 1, "b": [x]}), torch.ones(2))
    assert graph.output_ids == (1, 0)


# The arithmetic of quantization ------------------------------------------------------------------


def recorded(function: Callable[..., Any], *inputs: Tensor) -> FakeQuantizeOp:
    (op,) = QuantizationGraph.record(Lambda(function), inputs).fake_quantize_ops
    return op


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(),
        QuantizationScheme(4, False),
        QuantizationScheme(signed=False),
        QuantizationScheme(2, False, signed=False),
        QuantizationScheme(1),
        QuantizationScheme(symmetric=False, narrow_range=True),
        QuantizationScheme(3, granularity="channel", axis=1),
        QuantizationScheme(4, granularity="group", group_size=2),
        QuantizationScheme(granularity="token", dynamic=True),
        QuantizationScheme(32),
    ],
)
def test_calls_of_fake_quantize(scheme: QuantizationScheme) -> None:
    shape = {"channel": (4,), "group": (3, 2), "token": (3, 1)}.get(scheme.granularity, ())
    scale = torch.full(shape, 0.5)
    zero = scheme.symmetric_zero_point if scheme.symmetric else scheme.quant_max
    zero_point = torch.full(shape, zero, dtype=torch.int64)
    op = recorded(
        lambda x: fake_quantize(
            x,
            scale,
            zero_point,
            scheme.quant_min,
            scheme.quant_max,
            scheme.axis,
            group_size=scheme.group_size,
        ),
        torch.randn(3, 4),
    )
    assert op.scheme == scheme
    assert str(op).startswith(f"t1 = FakeQuantize(t0, bits={scheme.bits}, scale=0.5, ")
    op.validate()


def test_quantize_and_dequantize() -> None:
    scale, zero_point = torch.tensor([0.5, 0.25]), torch.tensor([0, 3])

    def forward(x: Tensor) -> Tensor:
        integers = quantize(x, scale, zero_point, -128, 127, 0)
        return dequantize(integers, scale, zero_point, 0)

    graph = QuantizationGraph.record(Lambda(forward), torch.randn(2, 3))
    assert [str(item) for item in graph][1:] == [
        "t1 = Quantize(t0, scale=0.25..0.5, zero_point=0..3, axis=0) : Int8 [2, 3]",
        "t2 = Dequantize(t1, scale=0.25..0.5, zero_point=0..3, axis=0) : Float32 [2, 3]",
    ]
    graph.validate()


def test_dynamic_ranges_are_one_line() -> None:
    scheme = QuantizationScheme(granularity="token", dynamic=True)
    graph = QuantizationGraph.record(
        Lambda(lambda x: fake_quantize_dynamically(x, scheme)), torch.randn(2, 3)
    )
    assert [item.kind for item in graph] == ["Input", "FakeQuantize"]
    assert "scale=auto" in str(graph[1])
    assert graph.fake_quantize_ops[0].scheme == scheme


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_the_operators_of_an_exported_model() -> None:
    scale, zero_point = torch.tensor(0.5), torch.tensor(0)

    def forward(x: Tensor) -> Tensor:
        return fake_quantize(x, scale, zero_point, -127, 127) + 1

    exported = torch.export.export(Lambda(forward), (torch.randn(2, 3),)).module(check_guards=False)
    graph = QuantizationGraph.record(exported, torch.randn(2, 3))
    assert [item.kind for item in graph] == ["Input", "FakeQuantize", "Add"]
    assert "bits=8, scale=0.5, zero_point=0, symmetric=True" in str(graph[1])


# Nothing changes ---------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Counts, draws, remembers and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.cache: list[Tensor] = []
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        self.cache.append(input)
        random.random()
        return self.dropout(self.norm(input.add_(torch.randn(6))))


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = Stateful()
    model.norm.eval()
    model.train()
    model.dropout.eval()
    fired: list[str] = []
    handle = model.norm.register_forward_hook(lambda *_: fired.append("user"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    random_state = (torch.get_rng_state(), random.getstate())
    inputs = torch.ones(4, 6, requires_grad=True)

    graph = QuantizationGraph.record(model, inputs)

    assert "BatchNorm1d" in str(graph)
    assert_identical(dict(model.state_dict()), before)
    assert [module.training for module in model.modules()] == modes
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model.cache == []
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert random.getstate() == random_state[1]
    assert torch.equal(inputs, torch.ones(4, 6))
    handle.remove()


def test_a_model_that_raises_stays_as_it_was() -> None:
    def fail(input: Tensor) -> Tensor:
        raise ValueError("no")

    model = nn.Sequential(nn.Linear(6, 4), Lambda(fail)).train()
    with pytest.raises(ConfigError, match="no"):
        QuantizationGraph.record(model, torch.randn(2, 6))
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert torch.overrides._get_current_function_mode() is None


def test_listing_does_not_import_the_compiler() -> None:
    known = "torch._dynamo" in sys.modules
    QuantizationGraph.record(nn.ReLU(), torch.ones(2))
    assert ("torch._dynamo" in sys.modules) == known
