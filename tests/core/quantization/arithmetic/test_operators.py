"""The registered operators: equal to the functions, traceable, differentiable."""

import pytest
import torch
from torch import nn

from compression_manager.quantization import QuantizationScheme, dequantize, fake_quantize, quantize
from compression_manager.quantization.arithmetic import operators as registered
from compression_manager.quantization.arithmetic.parameters import choose_qparams
from compression_manager.quantization.arithmetic.ranges import tensor_range
from compression_manager.quantization.exporting import exporting

SCHEMES = [
    QuantizationScheme(8, False, signed=False),
    QuantizationScheme(4, granularity="channel", axis=1),
    QuantizationScheme(4, False, granularity="group", group_size=4),
    QuantizationScheme(granularity="token", dynamic=True),
    QuantizationScheme(28),
]


def problem(scheme, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 10, generator=generator)
    scale, zero_point = choose_qparams(*tensor_range(x / 2, scheme), scheme)
    limits = (scheme.quant_min, scheme.quant_max, scheme.axis, scheme.group_size)
    return x.requires_grad_(requires_grad), scale, zero_point, *limits


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_torch_finds_nothing_wrong_with_them(scheme):
    for arguments in (problem(scheme), problem(scheme, requires_grad=True)):
        torch.library.opcheck(registered.fake_quantize, (*arguments, False))
        torch.library.opcheck(registered.fake_quantize, (*arguments, True))
    torch.library.opcheck(registered.quantize, problem(scheme))
    _, scale, zero_point, _, _, axis, group_size = problem(scheme)
    integers = registered.quantize(*problem(scheme))
    torch.library.opcheck(
        registered.dequantize, (integers, scale, zero_point, axis, group_size, torch.float64)
    )


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_and_gradients_equal_the_functions(scheme, passes):
    results = []
    for compute in (torch.ops.compression_manager.fake_quantize, _function):
        arguments = problem(scheme, requires_grad=True)
        output = compute(*arguments, passes)
        output.backward(torch.linspace(1, 2, output.numel()).reshape(output.shape))
        results.append((output.detach(), arguments[0].grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert bool((results[0][1] == 0).any()) != passes


def _function(x, scale, zero_point, quant_min, quant_max, axis, group_size, passes):
    return fake_quantize(
        x,
        scale,
        zero_point,
        quant_min,
        quant_max,
        axis,
        group_size=group_size,
        pass_clipped_gradient=passes,
    )


class Model(nn.Module):
    """All three functions in one forward pass."""

    def __init__(self, scheme):
        super().__init__()
        self.scheme = scheme
        _, scale, zero_point, *self.limits = problem(scheme)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x):
        parameters = (self.scale, self.zero_point)
        quant_min, quant_max, axis, group_size = self.limits
        options = {"group_size": group_size}
        fake = fake_quantize(x, *parameters, quant_min, quant_max, axis, **options)
        integers = quantize(x, *parameters, quant_min, quant_max, axis, **options)
        return fake + dequantize(integers, *parameters, axis, **options)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
def test_export_holds_one_operator_for_each_call(scheme, strict):
    model, x = Model(scheme), problem(scheme)[0]
    program = torch.export.export(model, (x,), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    for name in ("fake_quantize", "quantize", "dequantize"):
        assert called.count(f"compression_manager.{name}.default") == 1
    assert torch.equal(program.module()(x), model(x))


def test_export_with_a_dynamic_batch():
    scheme = SCHEMES[0]
    model, x = Model(scheme), problem(scheme)[0]
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    longer = torch.randn(7, 10)
    assert torch.equal(program.module()(longer), model(longer))


def test_compiled_without_a_break_and_traced_into():
    model, x = Model(SCHEMES[0]), problem(SCHEMES[0])[0]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 1
    assert "compression_manager" not in graphs[0].code


PIXELS, CODES = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.int8)
ZERO = torch.tensor(0)


@pytest.mark.parametrize(
    ("compute", "input", "is_operator"),
    [
        (lambda x: fake_quantize(x, 0.1, 0, -128, 127), PIXELS, True),
        (lambda x: fake_quantize(x, 0.1, 0, -127, 127), PIXELS, True),
        (lambda x: fake_quantize(x, 0.1, 3, 0, 255), PIXELS, True),
        (lambda x: fake_quantize(x, 0.1, 0, -128, 100), PIXELS, False),
        (lambda x: fake_quantize(x, 0.1, 0, -8, 7), PIXELS, False),
        (lambda x: fake_quantize(x, 0.1, 0, -128, 127), PIXELS.double(), False),
        (lambda x: fake_quantize(x, 0.1, 0, -128, 127, 0), PIXELS, False),
        (lambda x: fake_quantize(x, torch.full((3, 1), 0.1), 0, -128, 127), PIXELS, False),
        (lambda x: dequantize(x, 0.1, 0), CODES, True),
        (lambda x: dequantize(x, torch.full((3,), 0.1), 0, 0), CODES, True),
        (lambda x: dequantize(x, 0.1, 3), CODES, False),
        (lambda x: dequantize(x, 0.1, ZERO), CODES, False),
        (lambda x: dequantize(x, 0.1, 0), CODES.to(torch.uint8), False),
        (lambda x: dequantize(x, 0.1, 0, dtype=torch.float64), CODES, False),
        (lambda x: dequantize(x, torch.full((3, 2), 0.1), 0, group_size=2), CODES, False),
        (lambda x: quantize(x, 0.1, 0, -128, 127), PIXELS, False),
    ],
)
def test_for_eight_bit_kernels_the_rest_is_exported_as_formulas(compute, input, is_operator):
    class Call(nn.Module):
        def forward(self, x):
            return compute(x)

    with exporting("eight bits"):
        program = torch.export.export(Call(), (input,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("compression_manager" in name for name in called) == is_operator
    assert torch.equal(program.module()(input), compute(input))
