"""What a call of a torch function is named in a graph, and which attributes it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

# Functions whose names differ only in how they are called, or say little.
_KINDS = {
    "truediv": "Div",
    "true_divide": "Div",
    "divide": "Div",
    "rdiv": "Div",
    "rtruediv": "Div",
    "floordiv": "FloorDivide",
    "rfloordiv": "FloorDivide",
    "multiply": "Mul",
    "subtract": "Sub",
    "rsub": "Sub",
    "rpow": "Pow",
    "rmatmul": "MatMul",
    "mod": "Remainder",
    "negative": "Neg",
    "mm": "MatMul",
    "bmm": "MatMul",
    "matmul": "MatMul",
    "view": "Reshape",
    "view_as": "Reshape",
    "reshape_as": "Reshape",
    "unsafe_view": "Reshape",
    "unflatten": "Reshape",
    "t": "Transpose",
    "mT": "Transpose",
    "H": "Transpose",
    "mH": "Transpose",
    "T": "Transpose",
    "swapaxes": "Transpose",
    "swapdims": "Transpose",
    "cat": "Concat",
    "concatenate": "Concat",
    "getitem": "Slice",
    "setitem": "SetSlice",
    "to": "Cast",
    "type": "Cast",
    "float": "Cast",
    "double": "Cast",
    "half": "Cast",
    "bfloat16": "Cast",
    "int": "Cast",
    "long": "Cast",
    "bool": "Cast",
    "to_copy": "Cast",
    "type_as": "Cast",
    "tensor": "Constant",
    "as_tensor": "Constant",
    "multi_head_attention_forward": "MultiHeadAttention",
}
# Their result is the input for every reader: the same numbers, elsewhere in memory.
_COPIES = frozenset({"detach", "data", "alias", "clone", "contiguous", "cpu", "cuda", "lift_fresh"})
_REVERSED = frozenset({"rsub", "rdiv", "rtruediv", "rfloordiv", "rpow", "rmatmul"})
# The second tensor only lends its shape or type.
_READS_FIRST_ONLY = frozenset({"view_as", "reshape_as", "expand_as", "type_as", "to"})
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "FloorDivide", "Remainder", "Pow"})
_OPERANDS = {
    "linear": ("input", "weight", "bias"),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d"),
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    ),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
}


class Call(NamedTuple):
    """One call of a torch function.

    Attributes:
        name: of the function, without what marks operators and in-place forms.
        operands: tensors and numbers that it was given, in the order in which they are read.
        options: name -> value of the arguments that are known by name.
    """

    name: str
    operands: list[Any]
    options: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it reads."""
        tensors = [value for value in self.operands if isinstance(value, Tensor)]
        return tensors[:1] if self.name in _READS_FIRST_ONLY else tensors

    @property
    def is_copy(self) -> bool:
        """Whether readers may take the result for the input."""
        return self.name in _COPIES

    def kind(self, output: Tensor) -> str:
        """Return the operation's name, given what it returned."""
        if self.name == "batch_norm" and self.tensors:
            return f"BatchNorm{max(self.tensors[0].dim() - 2, 1)}d"
        kind = _KINDS.get(self.name) or _camel_case(self.name)
        if kind == "Cast" and self.tensors and self.tensors[0].dtype == output.dtype:
            return "Copy"
        return kind

    def label(self, id_of: Callable[[Tensor], int], kind: str) -> str | None:
        """Return the arguments' text if a number is one of them, as in `Mul(t3, 0.5)`."""
        if kind not in _ARITHMETIC or len(self.tensors) == len(self.operands):
            return None
        return ", ".join(
            f"t{id_of(value)}" if isinstance(value, Tensor) else _format_number(value)
            for value in self.operands
        )

    def attributes(self) -> dict[str, Any]:
        """Return what the checks of a convolution need, and nothing for the rest."""
        if not self.name.startswith("conv") or self.name not in _OPERANDS:
            return {}
        names = ("stride", "padding", "dilation", "groups")
        found = {name: self.options[name] for name in names if name in self.options}
        return {"kernel_size": tuple(self.tensors[1].shape[2:]), **found}


def read_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call:
    """Return the call of `function`, a torch function, method, property or operator."""
    name = function_name(function)
    options = dict(kwargs)
    if name == "convolution":  # the operator below torch's functions
        name, args = _named_convolution(args)
    if name in _OPERANDS:
        options = {**dict(zip(_OPERANDS[name], args, strict=False)), **kwargs}
        operands = [options.get(operand) for operand in ("input", "weight", "bias")]
        return Call(name, [value for value in operands if value is not None], options)
    # Numbers by keyword are options, such as the `alpha` of an addition.
    operands = [value for value in tree_leaves(args) if isinstance(value, (Tensor, int, float))]
    operands += [value for value in tree_leaves(options) if isinstance(value, Tensor)]
    if name in _REVERSED:
        operands.reverse()
    return Call(name, operands, options)


def bound_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return name -> value of all arguments, of a Python function or an operator."""
    schema = getattr(function, "_schema", None)
    if schema is None:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    defaults = {item.name: item.default_value for item in schema.arguments}
    given = dict(zip(defaults, args, strict=False))
    return {**defaults, **given, **kwargs}


def function_name(function: Callable[..., Any]) -> str:
    """Return for example `add` for `torch.add`, `Tensor.__iadd__` and `aten.add_.Tensor`."""
    packet = getattr(function, "_overloadpacket", function)
    name: str = getattr(packet, "__name__", type(function).__name__)
    if name == "__get__":  # a property of Tensor
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    is_operator = name.startswith("__") and name.endswith("__")
    name = name.strip("_") or name
    if is_operator and name.startswith("i") and name[1:] in _IN_PLACE_OPERATORS:
        return name[1:]
    return name


_IN_PLACE_OPERATORS = frozenset(
    [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "matmul",
    ]
)


def _named_convolution(args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """Return the function that calls `aten.convolution` with `args`, and its arguments."""
    *operands, stride, padding, dilation, transposed, output_padding, groups = args
    rank = operands[1].dim() - 2
    if transposed:
        tail = (stride, padding, output_padding, groups, dilation)
        return f"conv_transpose{rank}d", (*operands, *tail)
    return f"conv{rank}d", (*operands, stride, padding, dilation, groups)


def _format_number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _camel_case(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_") if part)
