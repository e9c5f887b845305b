"""Attention of a traced model as runtimes of ONNX multiply it on integers.

The exporter's own translation multiplies query and key by a factor each, between quantizing and
multiplying, so that no runtime finds integers there. The formula multiplies what comes out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from compression_manager.quantization.arithmetic import operators

# Of torch.fx: their arguments have a type that nothing can be done with before asserting.
Node = Any

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
# In their order; what is left out is plain.
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def write_attention(program: ExportedProgram) -> None:
    """Write attention of quantized queries and keys as its formula, in place.

    Args:
        program: traced with the view `operators`.
    """
    assert operators.fake_quantize is not None  # the import registers the operators
    for node in list(program.graph.nodes):
        if node.target is _ATTENTION and _has_formula(node):
            _write_formula(node)
    program.graph_module.recompile()


def _has_formula(node: Node) -> bool:
    """Return whether query and key are quantized, with no mask and no shared heads."""
    given = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    if any(given.get(name) for name in (*_ARGUMENTS[3:], "enable_gqa")):
        return False
    fake_quantize = torch.ops.compression_manager.fake_quantize.default
    return all(given[name].target is fake_quantize for name in ("query", "key"))


def _write_formula(node: Node) -> None:
    """Write softmax(query @ key^T * scale) @ value."""
    aten = torch.ops.aten
    query, key, value = node.args[:3]
    queries, keys, result = (item.meta["val"] for item in (query, key, node))
    with result.fake_mode:
        turned = keys.transpose(-2, -1)
        # As its shape says: a product of these fixes the batch size in torch 2.11.
        scores = result.new_empty((*result.shape[:-1], keys.shape[-2]))
    scale = node.kwargs.get("scale")
    factor = 1.0 / math.sqrt(queries.shape[-1]) if scale is None else scale
    with node.graph.inserting_before(node):
        transposed = _call(node, turned, aten.transpose.int, key, -2, -1)
        new = _call(node, scores, aten.matmul.default, query, transposed)
        new = _call(node, scores, aten.mul.Tensor, new, factor)
        new = _call(node, scores, aten.softmax.int, new, -1)
        new = _call(node, result, aten.matmul.default, new, value)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _call(node: Node, value: Tensor, target: Any, *args: Any) -> Node:
    """Insert a call before `node`, with the value that exporters ask it for."""
    new = node.graph.call_function(target, args)
    new.meta["val"] = value
    return new
