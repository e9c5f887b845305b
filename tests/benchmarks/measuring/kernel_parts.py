"""What a kernel belongs to, by its name in torch's profiler or in OpenVINO's counters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.profiler import record_function

from compression_manager.quantization.integer.passes import Passes

INTEGERS = "products of integers"
FLOATS = "products of floats"
QUANTIZATION = "quantization"
OTHERS = "other operators"
KERNEL_PARTS = (INTEGERS, FLOATS, QUANTIZATION, OTHERS)

FLOAT_PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution",
    "aten::mkldnn_convolution", "aten::_scaled_dot_product",
)  # fmt: skip
"""How torch's operators that multiply floats begin."""

# How Inductor calls those that it chooses itself.
_COMPILED_PRODUCTS = (
    "mkldnn::_convolution", "mkldnn::_linear", "mkl::_mkl_linear", "aten::mkldnn__convolution",
    "aten::mkldnn__linear", "aten::_mkl_linear",
)  # fmt: skip
_INTEGER_PRODUCT = re.compile("qlinear|qconv|_int_mm")
# Kernels that Inductor generates are called after the operators in them, and numbered.
_GENERATED = re.compile(r"cpp_fused_(.*)_\d+$")
# What these leave of such a name are operators that compute something else.
_ONLY_QUANTIZES = re.compile(
    r"(de)?quantize_per_tensor|_?(clamp|clone|permute|transpose|unsafe_view|view)"
)
# AOTInductor calls torch's operators so.
_AOT = "aoti_torch_cpu_"

# All that compute something; the others only answer.
_PASSES = tuple(
    name
    for name in sorted(Passes.__abstractmethods__)
    if not name.startswith("supports") and name != "integer_kernel"
)
# Those that multiply.
_PRODUCT_PASSES = ("multiply", "convolve", "convolution")
_MARK = "passes::"

_NODE_PRODUCTS = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")
_NODE_QUANTIZES = ("FakeQuantize", "Reorder", "Convert")


@contextmanager
def marked(passes: Passes) -> Iterator[None]:
    """Let the profiler see the methods of `passes`, which may call no operator."""
    owner = type(passes)
    originals = {name: getattr(owner, name) for name in _PASSES}

    def seen(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_MARK + name):
                return method(*args, **kwargs)

        return call

    for name, method in originals.items():
        setattr(owner, name, seen(name, method))
    try:
        yield
    finally:
        for name, method in originals.items():
            setattr(owner, name, method)


def part_of_pass(event: Any) -> str | None:
    """Return what an event within one of `Passes` belongs to; None outside of them."""
    for inside in _with_parents(event):
        if inside.name.startswith(_MARK):
            method = inside.name.removeprefix(_MARK)
            return INTEGERS if method.startswith(_PRODUCT_PASSES) else QUANTIZATION
    return None


def part_of_event(event: Any) -> str | None:
    """Return what an event's own time belongs to: one of `KERNEL_PARTS`; None if to no kernel.

    Args:
        event: of torch's profiler, with its name and its parent.
    """
    part = part_of_pass(event)
    if part is not None:
        return part
    for inside in _with_parents(event):
        if _INTEGER_PRODUCT.search(inside.name):
            return INTEGERS
        if _operator(inside.name).startswith((*FLOAT_PRODUCTS, *_COMPILED_PRODUCTS)):
            return FLOATS
    generated = _GENERATED.search(event.name)
    if generated:
        rest = _ONLY_QUANTIZES.sub("", generated[1]).strip("_")
        return OTHERS if rest or "quantize" not in generated[1] else QUANTIZATION
    is_operator = _operator(event.name).startswith(("aten::", "onednn::", "mkldnn::"))
    return OTHERS if is_operator else None


def part_of_node(kind: str, kernel: str, *, multiplies: bool = False) -> str:
    """Return what a node of OpenVINO's belongs to: one of `KERNEL_PARTS`.

    Args:
        kind: type of the node.
        kernel: what computes it, which ends with the type of its inputs.
        multiplies: whether there is a product among the operators that were put into the node.
    """
    if kind.startswith(_NODE_PRODUCTS):
        return INTEGERS if kernel.lower().endswith(("_i8", "_u8")) else FLOATS
    if multiplies:
        return FLOATS
    return QUANTIZATION if kind in _NODE_QUANTIZES else OTHERS


def _operator(name: str) -> str:
    return f"aten::{name.removeprefix(_AOT)}" if name.startswith(_AOT) else name


def _with_parents(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent
