"""Checking lines against one another: ids, numbers of inputs and shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from compression_manager import QuantizationError
from compression_manager.quantization import FakeQuantizeOp, QuantizationGraph
from compression_manager.quantization.graph import TensorOp

Shape = tuple[int | None, ...] | None


def source(number: int, *shape: int | None) -> TensorOp:
    return TensorOp("Input", (), number, shape)


def graph_of(kind: str, inputs: list[Shape], shape: Shape, **attributes: Any) -> QuantizationGraph:
    """One operation on inputs of the given shapes."""
    sources = [TensorOp("Input", (), number, item) for number, item in enumerate(inputs)]
    ids = tuple(range(len(inputs)))
    last = TensorOp(kind, ids, len(inputs), shape, attributes=attributes)
    return QuantizationGraph([*sources, last], [len(inputs)])


def refused(graph: QuantizationGraph, *reasons: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        graph.validate()
    line = str(graph[len(graph) - 1])
    assert f"line {len(graph)}, `{line}`" in str(caught.value)
    for reason in reasons:
        assert reason in str(caught.value)


def test_lines() -> None:
    graph = graph_of("Linear", [(3, 6), (4, 6)], (3, 4))
    assert str(graph).splitlines() == [
        "t0 = Input() : Float32 [3, 6]",
        "t1 = Input() : Float32 [4, 6]",
        "t2 = Linear(t0, t1) : Float32 [3, 4]",
    ]
    assert [str(item) for item in graph] == str(graph).splitlines()
    graph.validate()


def test_an_empty_graph_is_valid() -> None:
    QuantizationGraph().validate()
    assert str(QuantizationGraph()) == ""


# Ids ---------------------------------------------------------------------------------------------


def test_an_id_defined_twice() -> None:
    graph = QuantizationGraph([source(0, 2), TensorOp("Relu", (0,), 0, (2,))])
    refused(graph, "t0 is defined before, by `t0 = Input() : Float32 [2]`")


def test_an_id_used_before_it_is_defined() -> None:
    graph = QuantizationGraph([source(0, 2), TensorOp("Relu", (2,), 1, (2,))])
    refused(graph, "t2 is used before")


def test_an_operation_does_not_define_its_own_input() -> None:
    refused(QuantizationGraph([TensorOp("Relu", (0,), 0, (2,))]), "t0 is used before")
    with pytest.raises(QuantizationError, match="reads its own result"):
        FakeQuantizeOp(0, 0, (2,)).validate()


def test_an_output_that_no_line_defines() -> None:
    with pytest.raises(QuantizationError, match="output t5"):
        QuantizationGraph([source(0, 2)], [5]).validate()


def test_the_first_offending_line_is_named() -> None:
    bad = [TensorOp("Relu", (7,), 1, (2,)), TensorOp("Relu", (8,), 2, (2,))]
    with pytest.raises(QuantizationError, match=r"^line 2, `t1 = Relu\(t7\)"):
        QuantizationGraph([source(0, 2), *bad]).validate()


def test_a_fake_quantization_is_checked_as_part_of_the_graph() -> None:
    refused(QuantizationGraph([source(0, 2), FakeQuantizeOp(0, 1, (2,), 33)]), "1 to 32")
    refused(QuantizationGraph([source(0, 2), FakeQuantizeOp(0, 1, (3,))]), "differs")
    QuantizationGraph([source(0, None), FakeQuantizeOp(0, 1, (3,))]).validate()


# Numbers of inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "count", "valid"),
    [
        ("Relu", 2, "1"),
        ("Linear", 1, "2 to 3"),
        ("Linear", 4, "2 to 3"),
        ("Conv2d", 1, "2 to 3"),
        ("MatMul", 3, "2"),
        ("Add", 3, "1 to 2"),
        ("Input", 1, "0"),
        ("Reshape", 2, "1"),
        ("Addmm", 2, "3"),
    ],
)
def test_number_of_inputs(kind: str, count: int, valid: str) -> None:
    refused(graph_of(kind, [(2, 2)] * count, (2, 2)), f"reads {valid} tensors, got {count}")


def test_unknown_operations_read_any_number() -> None:
    graph_of("MyOwn", [(2,)] * 7, (2,)).validate()


# Matrix products ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "inputs", "shape"),
    [
        ("Linear", [(3, 6), (4, 6)], (3, 4)),
        ("Linear", [(6,), (4, 6), (4,)], (4,)),
        ("Linear", [(2, 3, 6), (6,)], (2, 3)),
        ("Linear", [(None, None), (4, 6)], (None, 4)),
        ("Linear", [None, (4, 6)], None),
        ("MatMul", [(2, 3), (3, 5)], (2, 5)),
        ("MatMul", [(3,), (3,)], ()),
        ("MatMul", [(2, 4, 3), (3,)], (2, 4)),
        ("MatMul", [(7, 2, 3), (7, 3, 5)], (7, 2, 5)),
        ("Addmm", [(5,), (2, 3), (3, 5)], (2, 5)),
    ],
)
def test_matrix_products_that_fit(kind: str, inputs: list[Shape], shape: Shape) -> None:
    graph_of(kind, inputs, shape).validate()


@pytest.mark.parametrize(
    ("kind", "inputs", "shape"),
    [
        ("Linear", [(3, 6), (4, 5)], (3, 4)),
        ("Linear", [(3, 6), (4, 6)], (3, 5)),
        ("Linear", [(3, 6), (4, 6, 1)], (3, 4)),
        ("MatMul", [(2, 3), (4, 5)], (2, 5)),
        ("MatMul", [(2, 3), (4,)], (2,)),
        ("Addmm", [(5,), (2, 3), (4, 5)], (2, 5)),
    ],
)
def test_matrix_products_that_do_not_fit(kind: str, inputs: list[Shape], shape: Shape) -> None:
    refused(graph_of(kind, inputs, shape))


def test_inner_dimensions_are_named() -> None:
    refused(
        graph_of("Linear", [(3, 6), (4, 5)], (3, 4)),
        "inner dimensions 6 and 5",
        "t0 [3, 6]",
        "t1 [4, 5]",
    )


@pytest.mark.parametrize(
    ("kind", "weight", "shape"),
    [("Linear", (5, 4), (3, 5)), ("Conv1d", (5, 4, 1), (3, 5, 7))],
)
def test_a_bias_has_a_value_for_each_output_channel(
    kind: str, weight: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    input = (3, 4, *shape[2:])
    graph_of(kind, [input, weight, (5,)], shape).validate()
    refused(graph_of(kind, [input, weight, (6,)], shape), "bias t2 [6] is to have 5 values")


# Convolutions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": "same"},
        {"padding": "valid", "dilation": 2},
        {"groups": 2},
        {"stride": (2,), "padding": (1,)},
    ],
)
def test_convolutions_as_torch_computes_them(rank: int, attributes: dict[str, Any]) -> None:
    channels = 4 // attributes.get("groups", 1)
    image = torch.zeros(2, 4, *(7, 9, 10)[:rank])
    weight = torch.zeros(6, channels, *(3, 5, 1)[:rank])
    output = getattr(F, f"conv{rank}d")(image, weight, **attributes)
    for batch in (2, None):
        inputs: list[Shape] = [(batch, *image.shape[1:]), tuple(weight.shape), (6,)]
        kernel = tuple(weight.shape[2:])
        graph_of(
            f"Conv{rank}d",
            inputs,
            (batch, *output.shape[1:]),
            kernel_size=kernel,
            **attributes,
        ).validate()
        wrong = (batch, 6, *(size + 1 for size in output.shape[2:]))
        refused(graph_of(f"Conv{rank}d", inputs, wrong, **attributes), "its inputs give")


@pytest.mark.parametrize(
    ("image", "weight", "attributes", "reason"),
    [
        ((1, 3, 8, 8), (4, 3, 3, 3), {"kernel_size": 5}, "kernel_size=5"),
        ((1, 3, 8, 8), (4, 3, 3, 3), {"kernel_size": (3, 1)}, "kernel_size=(3, 1)"),
        ((1, 3, 2, 2), (4, 3, 3, 3), {}, "does not fit"),
        ((1, 3, 4, 4), (4, 3, 3, 3), {"dilation": 2}, "reaches over 5 values"),
        ((1, 4, 8, 8), (4, 3, 3, 3), {}, "4 channels"),
        ((1, 3, 8, 8), (4, 3, 3, 3), {"groups": 3}, "groups=3"),
        ((1, 3, 8, 8), (4, 3, 3), {}, "3 dimensions, not 4"),
        ((3, 8), (4, 3, 3, 3), {}, "2 dimensions, not 3 or 4"),
    ],
)
def test_convolutions_that_do_not_fit(
    image: Shape, weight: Shape, attributes: dict[str, Any], reason: str
) -> None:
    refused(graph_of("Conv2d", [image, weight], None, **attributes), reason)


def test_unbatched_and_unknown_convolutions() -> None:
    graph_of("Conv2d", [(3, 8, 8), (4, 3, 3, 3)], (4, 6, 6)).validate()
    graph_of("Conv2d", [(None, 3, None, 8), (4, 3, 3, 3)], (None, 4, 5, 6)).validate()
    graph_of("Conv2d", [None, (4, 3, 3, 3)], None, kernel_size=3).validate()
    graph_of("Conv2d", [(1, 3, 8, 8), None], None, kernel_size=3).validate()


def test_transposed_convolutions() -> None:
    graph_of("ConvTranspose2d", [(1, 3, 4, 4), (3, 2, 3, 3)], (1, 2, 6, 6)).validate()
    wrong_channels = graph_of("ConvTranspose2d", [(1, 2, 4, 4), (3, 2, 3, 3)], (1, 2, 6, 6))
    refused(wrong_channels, "2 channels")
    wrong_kernel = [(1, 3, 4, 4), (3, 2, 3, 3)]
    refused(graph_of("ConvTranspose2d", wrong_kernel, None, kernel_size=2), "kernel_size=2")


# Shapes that must agree --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Reshape", "View", "Flatten", "Transpose", "Permute", "Squeeze"])
def test_elements_are_preserved(kind: str) -> None:
    graph_of(kind, [(2, 3, 4)], (6, 4)).validate()
    graph_of(kind, [(None, 3, 4)], (None, 12)).validate()
    refused(graph_of(kind, [(2, 3, 4)], (6, 5)), "30 elements cannot hold the 24")


def test_elementwise_operations_keep_the_shape() -> None:
    refused(graph_of("Relu", [(2, 3)], (3, 2)), "differs from that of its input t0 [2, 3]")
    refused(graph_of("Dequantize", [(2, 3)], (2, 3, 1)), "differs")
    graph_of("Relu", [(2, None)], (None, 3)).validate()
