"""A traced model in the operators in whose place Inductor puts oneDNN's 8-bit kernels.

Inductor looks for a linear layer or a convolution between `quantized_decomposed` operators
(torch/_inductor/fx_passes/quantization.py): of the input, uint8 with a number for scale and zero
point; of the weight, int8 per output channel. torch registers these operators in a private
module; only this one imports it.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx
from torch.export import ExportedProgram

from compression_manager.integrations.inductor_convolutions import CONVOLUTIONS, stays_float
from compression_manager.quantization.arithmetic import operators
from compression_manager.quantization.scheme import kernel_range

# Of torch.fx: their arguments have a type that nothing can be done with before asserting.
Node = Any

_LAYERS = CONVOLUTIONS | {torch.ops.aten.linear.default}

_DEQUANTIZED = frozenset(
    {
        torch.ops.quantized_decomposed.dequantize_per_tensor.default,
        torch.ops.quantized_decomposed.dequantize_per_tensor.tensor,
    }
)

# Sums, and differences that are equal to them once the other operand is negated.
_SUMS = {
    torch.ops.aten.add.Tensor: torch.ops.aten.sub.Tensor,
    torch.ops.aten.add_.Tensor: torch.ops.aten.sub_.Tensor,
}
# What Inductor takes out of a graph, or sees through, so that the operand is the tensor before it.
_TRANSPARENT = frozenset(
    {
        "alias", "clone", "contiguous", "detach", "dropout", "expand", "flatten", "permute",
        "reshape", "squeeze", "to", "transpose", "unflatten", "unsqueeze", "view",
    }
)  # fmt: skip


# What Inductor fuses with the linear layer before it, so that this cannot take a sum as well.
_ACTIVATIONS = frozenset(
    {"gelu", "hardswish", "hardtanh", "leaky_relu", "relu", "relu6", "sigmoid", "silu", "tanh"}
)


def to_inductor_operators(program: ExportedProgram) -> tuple[fx.GraphModule, int]:
    """Return the module of a program in Inductor's operators, and the number of its int8 weights.

    Args:
        program: traced with the view `eight bits`; one traced with `formulas` stays as it is.
    """
    assert operators.fake_quantize is not None  # the import registers the operators
    module = program.module()
    ours = torch.ops.compression_manager
    constants = _Constants(module)
    weights = 0
    for node in list(module.graph.nodes):
        if node.target is ours.fake_quantize.default:
            _replace(node, _quantized_input(constants, node))
        elif node.target is ours.dequantize.default:
            is_weight = _is_kernels_weight(constants, node)
            weights += is_weight
            _replace(node, _kernels_weight(constants, node) if is_weight else _formula(node))
    if weights:
        constants = _Constants(module)
        for node in list(module.graph.nodes):
            if node.target in _SUMS:
                _keep_operand(node, constants)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, weights


class _Constants:
    """The nodes of a graph that depend on no input, whose values freezing keeps.

    Found in one pass: asking each node for its inputs doubles the work with each layer.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self._nodes: set[Node] = set()
        for node in module.graph.nodes:
            is_computed = node.op == "call_function" and self._nodes.issuperset(
                node.all_input_nodes
            )
            if node.op == "get_attr" or is_computed:
                self._nodes.add(node)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def value(self, value: Any) -> Any:
        """Return the tensor that a node always has, or None; what is no node as it is."""
        if not isinstance(value, fx.Node):
            return value
        if value not in self:
            return None
        if value.op == "get_attr":
            return operator.attrgetter(cast(str, value.target))(self.module)
        target: Any = value.target
        args, kwargs = fx.map_arg((value.args, value.kwargs), self.value)
        return target(*args, **kwargs)


def _replace(node: Node, new: Node) -> None:
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _quantized_input(constants: _Constants, node: Node) -> Node:
    """Insert the operators of an input: float32, with one scale.

    Convolutions take uint8 alone. Integers and zero point of a signed input, both larger by 128,
    stand for the same numbers. A narrow range lacks the lowest integer, to which the kernels would
    clip: smaller numbers are clipped before.
    """
    input, scale, zero_point, quant_min, quant_max = node.args[:5]
    whole = kernel_range(quant_min, quant_max)
    assert whole is not None  # or the view `eight bits` would have shown the formula
    low, _ = whole
    graph, namespace = node.graph, torch.ops.quantized_decomposed
    values = constants.value(scale), constants.value(zero_point)
    with graph.inserting_before(node):
        if any(user.target is torch.ops.aten.linear.default for user in node.users):
            input = _contiguous(input)
        if values[0] is not None and values[1] is not None:
            scale, zero_point = float(values[0]), int(values[1]) - low
            if quant_min > low:
                least = (1 - zero_point) * scale
                input = graph.call_function(torch.ops.aten.clamp.default, (input, least))
            overload = "default"
        else:  # of a range that each input brings along, and does not leave
            zero_point = graph.call_function(torch.ops.aten.sub.Tensor, (zero_point, low))
            overload = "tensor"
        parameters = (scale, zero_point, 0, 255, torch.uint8)
        quantize = getattr(namespace.quantize_per_tensor, overload)
        integers = graph.call_function(quantize, (input, *parameters))
        dequantize = getattr(namespace.dequantize_per_tensor, overload)
        return graph.call_function(dequantize, (integers, *parameters))


def _contiguous(input: Node) -> Node:
    """Insert what makes the input of a linear layer contiguous, if it is a transposed one.

    Inductor (2.13) fails on a layer over a transposed input of three axes and an open batch size.
    """
    value = input.meta["val"]
    if value.dim() < 3 or value.is_contiguous():
        return input
    clone = input.graph.call_function(
        torch.ops.aten.clone.default, (input,), {"memory_format": torch.contiguous_format}
    )
    clone.meta["val"] = value.contiguous()
    return clone


def _is_kernels_weight(constants: _Constants, node: Node) -> bool:
    """Return whether this is a layer's weight: int8, symmetric, per output channel at most."""
    if not all(user.target in _LAYERS and user.args[1] is node for user in node.users):
        return False  # rows of a table, say, whose indices are constant
    weight = constants.value(node.args[0])
    if weight is None or constants.value(node.args[1]) is None:
        return False
    if any(user.target in CONVOLUTIONS and stays_float(user) for user in node.users):
        return False
    return weight.dim() > 1 and _axis(node) in (None, 0)


def _kernels_weight(constants: _Constants, node: Node) -> Node:
    """Insert the operator of a weight; scale and zero point are one for each output channel."""
    channels = constants.value(node.args[0]).shape[0]
    scale = constants.value(node.args[1]).expand(channels).contiguous()
    zero_point = torch.zeros(channels, dtype=torch.int64, device=scale.device)
    graph = node.graph
    with graph.inserting_before(node):
        parameters = [
            graph.get_attr(_add_buffer(constants.module, f"{node.name}_{suffix}", value))
            for suffix, value in (("scale", scale), ("zero_point", zero_point))
        ]
        return graph.call_function(
            torch.ops.quantized_decomposed.dequantize_per_channel.default,
            (node.args[0], *parameters, 0, -128, 127, torch.int8),
        )


def _keep_operand(node: Node, constants: _Constants) -> None:
    """Keep Inductor from sums of floats that it would compute in place, or fail on.

    It (2.13) fuses a layer and a sum into a kernel that writes to the other operand if no later
    node reads it; the owner of an input and the next call do. It knows sums only: x + y is
    x - (-y), to the last bit. Other types are not fused, and a mask cannot be negated.
    """
    left, right = node.args[:2]
    if node.kwargs or not (_is_float(left) and _is_float(right)):
        return
    keeps_left = _is_kept(left, right, constants)
    keeps_right = _is_kept(right, left, constants)
    if not (keeps_left or keeps_right):
        return
    if keeps_left and node.target is torch.ops.aten.add.Tensor:
        left, right = right, left
    with node.graph.inserting_before(node):
        negated = node.graph.call_function(torch.ops.aten.neg.default, (right,))
        _replace(node, node.graph.call_function(_SUMS[node.target], (left, negated)))


def _is_kept(node: Node, other: Node, constants: _Constants) -> bool:
    """Return whether Inductor must not fuse the sum of `node` and `other` with the layer of one."""
    return (
        _is_owned(node, constants) or _is_residual_of_none(node, other) or _is_activated_layer(node)
    )


def _is_activated_layer(node: Node) -> bool:
    """Return whether this is an activation of a linear layer that nobody else reads.

    Inductor (2.13) fuses both, and fails where it then finds the sum of that and another layer.
    """
    node = _behind_transparent(node)
    if node.op != "call_function" or _name_of(node.target).rstrip("_") not in _ACTIVATIONS:
        return False
    return len(node.users) == 1 and node.args[0].target is torch.ops.aten.linear.default


def _is_residual_of_none(node: Node, other: Node) -> bool:
    """Return whether 8-bit numbers are added to what is not a layer's own output.

    Inductor (2.13) fails where it fused an activation with the layer before such a sum.
    """
    return node.target in _DEQUANTIZED and other.target not in _LAYERS


def _is_float(value: Any) -> bool:
    """Return whether this is a node, and its value a tensor of floats."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(found, Tensor) and found.is_floating_point()


def _is_owned(node: Node, constants: _Constants) -> bool:
    """Return whether this is an input of the model, or a constant, in whatever shape."""
    node = _behind_transparent(node)
    return node.op == "placeholder" or node in constants


def _behind_transparent(node: Node) -> Node:
    while node.op == "call_function" and _name_of(node.target) in _TRANSPARENT:
        node = node.args[0]
    return node


def _name_of(target: Any) -> str:
    return str(target).removeprefix("aten.").partition(".")[0]


def _formula(node: Node) -> Node:
    """Insert integers * scale, the zero point being 0."""
    integers, scale = node.args[:2]
    graph, axis = node.graph, _axis(node)
    with graph.inserting_before(node):
        if axis is not None and scale.meta["val"].dim():
            shape = [1] * node.meta["val"].dim()
            shape[axis] = -1
            scale = graph.call_function(torch.ops.aten.reshape.default, (scale, shape))
        real = graph.call_function(torch.ops.aten.to.dtype, (integers, torch.float32))
        return graph.call_function(torch.ops.aten.mul.Tensor, (real, scale))


def _axis(node: Node) -> int | None:
    axis = node.args[3] if len(node.args) > 3 else None
    return None if axis is None else int(axis) % node.meta["val"].dim()


def _add_buffer(module: fx.GraphModule, name: str, value: Tensor) -> str:
    module.register_buffer(name, value)
    return name
