"""Deployed weights of less than 8 bits: packed, with the integers and numbers of unpacked ones."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compression_manager.deploy import LayerSpec
from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.kinds import CONVERTED_CLASSES
from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    QuantizationParameters,
    QuantizationScheme,
    choose_qparams,
    dequantize,
    quantize,
)
from compression_manager.quantization.arithmetic.ranges import tensor_range
from compression_manager.quantization.graph import QuantizationGraph
from compression_manager.quantization.integer.selection import reference_arithmetic
from compression_manager.quantization.storage import weight as weight_module
from integer_weights import numpy_grid, numpy_read
from quantization_reference import trained

FOUR_BITS = QuantizationScheme(4, granularity="channel")
SCHEMES = [
    *(QuantizationScheme(bits, granularity="channel") for bits in range(2, 8)),
    *(QuantizationScheme(bits, False, "channel") for bits in range(1, 8)),
    QuantizationScheme(4),
    QuantizationScheme(3, granularity="channel", axis=1),
    QuantizationScheme(5, False, "group", group_size=4),
]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def filled(layer: nn.Module, scheme: QuantizationScheme) -> ConvertedLayer:
    """`layer` as a deployed one, with the ranges of its weight."""
    spec = LayerSpec(type(layer).__name__, scheme, None, bias=False)
    converted = CONVERTED_CLASSES[spec.kind](layer, spec)
    weight = converted.stored_form(layer).detach()
    converted.fill(weight, parameters(weight, scheme), None, None)
    return converted


def parameters(weight: Tensor, scheme: QuantizationScheme) -> QuantizationParameters:
    scale, zero_point = choose_qparams(*tensor_range(weight, scheme), scheme)
    return QuantizationParameters(
        scale, zero_point, scheme.quant_min, scheme.quant_max, scheme.axis, scheme.group_size
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_trained_layer_holds_the_integers_that_numpy_finds(scheme: QuantizationScheme) -> None:
    torch.manual_seed(0)
    model = nn.Linear(11, 7)
    manager = trained(model, randn(4, 11), weight=scheme)
    converted: Any = manager.convert()
    stored = converted.state_dict()["weight"]
    assert stored.dtype == torch.uint8
    assert stored.shape == (-(-77 * scheme.bits // 8),)
    assert hasattr(converted, "weight_zero_point") == (not scheme.symmetric)
    found = numpy_read(converted.state_dict(), "weight", (7, 11), scheme)
    integers, scale, zero_point = numpy_grid(model.weight.detach().numpy(), scheme)
    assert np.array_equal(found[0], integers)
    np.testing.assert_allclose(found[1], scale, rtol=1e-6)
    assert np.array_equal(found[2], zero_point)
    assert converted.integer_weight().dtype == scheme.storage_dtype
    assert np.array_equal(converted.integer_weight().numpy(), integers)


GRANULARITIES: list[dict[str, Any]] = [
    {},
    {"granularity": "channel"},
    {"granularity": "channel", "axis": -1},
    {"granularity": "group", "group_size": 3},
]


@settings(deadline=None, max_examples=150)
@given(
    bits=st.integers(1, 7),
    symmetric=st.booleans(),
    signed=st.booleans(),
    narrow=st.sampled_from([None, False]),
    granularity=st.sampled_from(GRANULARITIES),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_packing_changes_no_bit_of_a_weight(
    bits, symmetric, signed, narrow, granularity, shape, dtype, seed
):
    scheme = QuantizationScheme(bits, symmetric, **granularity, signed=signed, narrow_range=narrow)
    torch.manual_seed(seed)
    height, width = shape
    layer = nn.Linear(width, height, bias=False, dtype=dtype)
    converted = filled(layer, scheme)
    exact = parameters(layer.weight.detach(), scheme)
    scale, zero_point = exact.scale, exact.zero_point
    limits = scheme.quant_min, scheme.quant_max, scheme.axis
    unpacked = quantize(
        layer.weight.detach(), scale, zero_point, *limits, group_size=scheme.group_size
    )
    assert torch.equal(converted.integer_weight(), unpacked)
    assert converted.integer_weight().dtype == unpacked.dtype
    expected = dequantize(
        unpacked, scale, zero_point, scheme.axis, dtype, group_size=scheme.group_size
    )
    assert torch.equal(converted.float_weight(dtype), expected)


@pytest.mark.parametrize("width", [8, 7, 1], ids=["rows of whole bytes", "others", "narrow"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_embedding_looks_up_rows_of_the_whole_weight(
    scheme: QuantizationScheme, width: int
) -> None:
    torch.manual_seed(0)
    converted = filled(nn.Embedding(6, width), scheme)
    table = converted.float_weight(torch.float32)
    for indices in (torch.tensor([[5, 0], [3, 3]]), torch.tensor(2), torch.empty(0, 3).long()):
        assert torch.equal(converted(indices), table[indices])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("indices", "error"),
    [
        (torch.tensor([1, -1]), IndexError),
        (torch.tensor([6]), IndexError),
        (torch.tensor([1, 0, 0, 0, 0, 0], dtype=torch.uint8), RuntimeError),
        (torch.ones(6, dtype=torch.bool), RuntimeError),
    ],
)
def test_an_embedding_refuses_the_indices_that_the_float_layer_refuses(
    bits: int, indices: Tensor, error: type[Exception]
) -> None:
    layer = nn.Embedding(6, 4)
    scheme = QuantizationScheme(bits=bits, granularity="channel", axis=0)
    for lookup in (layer, filled(layer, scheme)):
        with pytest.raises(error):
            lookup(indices)


def test_an_embedding_unpacks_only_the_rows_that_are_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converted = filled(nn.Embedding(1000, 6), FOUR_BITS)
    unpacked = []
    real = weight_module.unpack_bits

    def watch(packed: Tensor, bits: int, count: int) -> Tensor:
        unpacked.append(packed.numel())
        return real(packed, bits, count)

    monkeypatch.setattr(weight_module, "unpack_bits", watch)
    converted(torch.tensor([7, 7, 999]))
    assert unpacked == [3 * 3]


def test_a_zero_point_that_the_scheme_does_not_have_is_refused() -> None:
    layer = nn.Linear(4, 3)
    for scheme, value, valid in [
        (FOUR_BITS, 1, "is 0"),
        (QuantizationScheme(4, False, "channel"), 8, "is from -8 to 7"),
    ]:
        converted = filled(layer, scheme)
        before = copy.deepcopy(converted.state_dict())
        wrong = QuantizationParameters(
            torch.ones(3), torch.tensor([0, value, 0]), scheme.quant_min, scheme.quant_max, 0
        )
        with pytest.raises(QuantizationError, match=f"{valid}, got {value}"):
            converted.fill(layer.weight.detach(), wrong, None, None)
        assert all(map(torch.equal, converted.state_dict().values(), before.values()))


def test_equal_bytes_of_another_shape_are_not_shared() -> None:
    wide, tall = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
    scheme = QuantizationScheme(4)
    with torch.no_grad():
        tall.weight.copy_(wide.weight.reshape(6, 2))
    first, second = filled(wide, scheme), filled(tall, scheme)
    assert torch.equal(first.state_dict()["weight"], second.state_dict()["weight"])
    second.share_weight(first)
    assert second.weight_tensors()[""] is not first.weight_tensors()[""]


# Graphs -----------------------------------------------------------------------------------------


class Language(nn.Module):
    """Embeddings, attention, a transposed convolution and an output layer; input (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.places = nn.Embedding(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.words(input) + self.places(torch.arange(input.shape[1]))
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        logits: Tensor = self.head(self.up(hidden.transpose(1, 2)).relu().mean(-1))
        return logits


INDICES = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(0))


def language(scheme: QuantizationScheme) -> nn.Module:
    torch.manual_seed(0)
    return trained(Language(), INDICES, weight=scheme).convert()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_an_exported_program_holds_the_packed_integers(bits: int, strict: bool) -> None:
    model = language(QuantizationScheme(bits, False, "channel"))
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (INDICES,), dynamic_shapes=shapes, strict=strict)
    for indices in (INDICES, INDICES[:2], INDICES.repeat(3, 1)):
        assert torch.equal(program.module()(indices), model(indices))
    for name, tensor in model.state_dict().items():
        assert torch.equal(program.state_dict[name], tensor)
        assert program.state_dict[name].dtype == tensor.dtype
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("compression_manager.unpack_bits.default") == 8
    assert not any("shift" in target for target in targets)


def test_compiles_without_graph_breaks() -> None:
    model = language(FOUR_BITS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), reference_arithmetic():  # what is compiled takes no integer kernels
        assert torch.equal(compiled(INDICES), model(INDICES))


def test_a_recorded_graph_lists_unpacking_as_one_operation() -> None:
    torch.manual_seed(0)
    model = trained(nn.Linear(6, 4), randn(3, 6), weight=FOUR_BITS).convert()
    graph = QuantizationGraph.record(model, randn(3, 6))
    kinds = [line.kind for line in graph]
    assert kinds[2:6] == ["Buffer", "UnpackBits", "Reshape", "Dequantize"]
    graph.validate()
