"""EmbeddingBag: every mode, with offsets, weights and padding, against torch on numpy's table."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layer_reference import quantized, quantized_weight

FLAT = torch.tensor([0, 2, 5, 5, 1, 2])
CALLS = {
    "rows": (FLAT.reshape(2, 3), None),
    "offsets": (FLAT, torch.tensor([0, 1, 1, 4])),
    "int32": (FLAT.int(), torch.tensor([0, 4], dtype=torch.int32)),
}


def expected_bags(layer, table, input, offsets, factors):
    return F.embedding_bag(
        input, table, offsets, mode=layer.mode, per_sample_weights=factors,
        padding_idx=layer.padding_idx, include_last_offset=layer.include_last_offset,
        scale_grad_by_freq=layer.scale_grad_by_freq,
    )  # fmt: skip


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
@pytest.mark.parametrize("rows_of_table", [6, 40])  # of more rows than indices, some are quantized
def test_embedding_bags_equal_the_reference(rows_of_table, mode, call, padding_idx):
    torch.manual_seed(0)
    input, offsets = CALLS[call]
    layer = nn.EmbeddingBag(
        rows_of_table, 3, mode="sum" if mode == "weighted" else mode, padding_idx=padding_idx
    )
    factors = torch.rand(input.shape) if mode == "weighted" else None
    table, _ = quantized_weight(layer.weight)
    table.requires_grad_()
    expected = expected_bags(layer, table, input, offsets, factors)
    expected.sin().sum().backward()
    layer = quantized(layer)
    assert layer.input_quantizer is None
    output = layer(input, offsets, factors)
    torch.testing.assert_close(output, expected)
    output.sin().sum().backward()
    torch.testing.assert_close(layer.weight.grad, table.grad)
    assert layer.weight.grad.any()


@pytest.mark.parametrize(("options", "offsets"), [
    ({"include_last_offset": True, "mode": "sum"}, [0, 2, 6]),
    ({"scale_grad_by_freq": True, "mode": "mean"}, [0, 2]),
])  # fmt: skip
@pytest.mark.parametrize("rows_of_table", [6, 40])
def test_options_are_those_of_the_float_layer(rows_of_table, options, offsets):
    torch.manual_seed(0)
    layer = nn.EmbeddingBag(rows_of_table, 3, **options)
    table, _ = quantized_weight(layer.weight)
    table.requires_grad_()
    expected = expected_bags(layer, table, FLAT, torch.tensor(offsets), None)
    expected.sin().sum().backward()
    output = quantized(layer)(FLAT, torch.tensor(offsets))
    output.sin().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(layer.weight.grad, table.grad)


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_rows_of_a_large_table_that_nobody_looks_up_are_not_quantized():
    layer = quantized(nn.EmbeddingBag(1000, 3, mode="sum"))
    for training in (True, False):
        with LargestResult() as largest:
            layer.train(training)(FLAT, torch.tensor([0]))
        assert largest.elements < 1000
