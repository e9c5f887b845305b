"""The operators exported to ONNX and run by onnxruntime, against torch."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from compression_manager.integrations.onnx_translation import onnx_translation_table
from compression_manager.quantization import (
    DynamicFakeQuantizer,
    QuantizationScheme,
    QuantizationSite,
    dequantize,
    fake_quantize,
    quantize,
)
from compression_manager.quantization.arithmetic.parameters import choose_qparams
from compression_manager.quantization.arithmetic.ranges import tensor_range
from compression_manager.quantization.storage import unpack_bits
from quantization_reference import trained

FORMULA = [
    QuantizationScheme(4, False, granularity="channel", axis=-1, signed=False),
    QuantizationScheme(4, False, granularity="group", group_size=7),
    QuantizationScheme(granularity="token", dynamic=True),
]
LINEAR = [
    QuantizationScheme(8, False, signed=False),
    QuantizationScheme(8, False, granularity="channel", axis=1),
]


class Model(nn.Module):
    """Fake-quantized input, and the input from integers and back."""

    def __init__(self, scheme, input):
        super().__init__()
        self.limits = (scheme.quant_min, scheme.quant_max, scheme.axis)
        self.group_size = scheme.group_size
        scale, zero_point = choose_qparams(*tensor_range(input / 2, scheme), scheme)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, input):
        arguments = (self.scale, self.zero_point)
        options = {"group_size": self.group_size}
        fake = fake_quantize(input, *arguments, *self.limits, **options)
        integers = quantize(input, *arguments, *self.limits, **options)
        real = dequantize(integers, *arguments, self.limits[-1], input.dtype, **options)
        return fake, integers, real


def exported(model, *inputs, **options):
    program = torch.onnx.export(
        model.eval(), inputs, dynamo=True, verbose=False,
        custom_translation_table=onnx_translation_table(), **options,
    )  # fmt: skip
    return program.model_proto


def run(model, *inputs):
    """The outputs of torch and of onnxruntime, and the kinds of nodes exported."""
    proto = exported(model, *inputs)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [one.name for one in session.get_inputs()]
    arrays = [one.numpy() for one in inputs]
    actual = session.run(None, dict(zip(names, arrays, strict=True)))
    kinds = {node.op_type for node in proto.graph.node}
    return [value.numpy() for value in model(*inputs)], actual, kinds


@pytest.mark.parametrize("scheme", FORMULA, ids=str)
def test_the_formula_gives_equal_numbers(scheme):
    input = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    expected, actual, kinds = run(Model(scheme, input), input)
    assert "Round" in kinds
    for one, other in zip(expected, actual, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bits", [8, 30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_the_formula_is_computed_as_wide_as_by_torch(dtype, bits):
    scheme = QuantizationScheme(bits)
    input = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, actual, _ = run(Model(scheme, input), input)
    for one, other in zip(expected, actual, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scheme", LINEAR, ids=str)
def test_whole_integer_types_become_linear_nodes(scheme):
    input = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(0))
    model = Model(scheme, input)
    expected, actual, kinds = run(model, input)
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert "Round" not in kinds
    step = float(model.scale.max())
    for one, other in zip(expected, actual, strict=True):
        assert one.dtype == other.dtype
        limit = 1 if one.dtype.kind in "iu" else step * 1.0001
        difference = np.abs(one.astype(np.float64) - other)
        assert difference.max() <= limit
        assert (difference > 1e-6).mean() <= 0.001


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_narrow_range_is_clipped_before_a_linear_node(granularity, signed):
    scheme = QuantizationScheme(8, granularity=granularity, signed=signed)
    input = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(0))
    scale, zero_point = choose_qparams(*tensor_range(input / 2, scheme), scheme)

    class Narrow(nn.Module):
        def forward(self, input):
            limits = (scheme.quant_min, scheme.quant_max, scheme.axis)
            return (fake_quantize(input, scale, zero_point, *limits),)

    expected, actual, kinds = run(Narrow(), input)
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert "Round" not in kinds
    lowest = (scheme.quant_min - scheme.symmetric_zero_point) * float(scale.max())
    np.testing.assert_allclose(actual[0].min(), lowest, rtol=1e-6)
    difference = np.abs(expected[0].astype(np.float64) - actual[0])
    assert difference.max() <= float(scale.max()) * 1.0001
    assert (difference > 1e-6).mean() <= 0.001


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_ranges_at_run_time(granularity):
    scheme = QuantizationScheme(4, False, granularity, dynamic=True, signed=False)
    model = DynamicFakeQuantizer(scheme, QuantizationSite("fc", "activation"))
    model.set_phase(observing=True, quantizing=True)
    input = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    expected, actual, _ = run(nn.Sequential(model), input)
    np.testing.assert_allclose(actual[0], np.stack(expected), rtol=1e-6)


class Unpacked(nn.Module):
    def __init__(self, bits, counts):
        super().__init__()
        self.bits, self.counts = bits, counts

    def forward(self, *packed):
        return tuple(
            unpack_bits(streams, self.bits, count)
            for streams, count in zip(packed, self.counts, strict=True)
        )


@pytest.mark.parametrize("bits", range(1, 8))
def test_packed_bits(bits):
    counts, streams = (1, 21, 21, 16), ((), (), (3,), (2, 3))
    generator = torch.Generator().manual_seed(0)
    packed = [
        torch.randint(256, (*shape, -(-count * bits // 8)), dtype=torch.uint8, generator=generator)
        for shape, count in zip(streams, counts, strict=True)
    ]
    expected, actual, kinds = run(Unpacked(bits, counts), *packed)
    assert "BitShift" in kinds
    for unpacked, reference in zip(actual, expected, strict=True):
        assert unpacked.dtype == np.uint8
        np.testing.assert_array_equal(unpacked, reference)


class Wide(nn.Module):
    """An embedding, a convolution and an output layer, none of them tiny."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(300, 64)
        self.conv = nn.Conv1d(64, 96, 3)
        self.head = nn.Linear(96, 200)

    def forward(self, indices):
        hidden = self.conv(self.words(indices).transpose(1, 2)).relu()
        return (self.head(hidden.mean(-1)),)


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(granularity="channel"),
        QuantizationScheme(4, granularity="channel"),
        QuantizationScheme(3, False, "channel"),
    ],
    ids=str,
)
def test_converted_models_keep_their_integers(scheme):
    torch.manual_seed(0)
    indices = torch.randint(300, (3, 7))
    manager = trained(Wide(), indices, weight=scheme, activation=None)
    converted = manager.convert()
    expected, actual, _ = run(converted, indices)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    sizes = {weight.numel() for weight in Wide().parameters() if weight.dim() > 1}
    # By default the exporter computes what follows from small constants, unpacked integers too.
    graph = exported(converted, indices, optimize=False).graph
    constants = [numpy_helper.to_array(item) for item in graph.initializer]
    assert not any(item.dtype.kind == "f" and item.size in sizes for item in constants)
    stored = sum(value.nbytes for value in converted.state_dict().values())
    assert sum(item.nbytes for item in constants) <= 1.02 * stored
