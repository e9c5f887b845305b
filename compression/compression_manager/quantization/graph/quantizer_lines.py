"""The lines of fake quantizers and of the quantization arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic import rounding
from compression_manager.quantization.graph.fake_quantize_op import (
    FakeQuantizeOp,
    format_scale,
    format_zero_point,
)
from compression_manager.quantization.graph.naming import bound_arguments
from compression_manager.quantization.graph.operations import Operation, TensorOp, format_dtype
from compression_manager.quantization.graph.tensor_ids import TensorIds
from compression_manager.quantization.quantizers.dynamic_quantizer import fake_quantize_dynamically
from compression_manager.quantization.quantizers.quantizer_module import FakeQuantizer
from compression_manager.quantization.scheme import QuantizationScheme

_ARITHMETIC: dict[object, str] = {
    rounding.fake_quantize: "fake_quantize",
    rounding.quantize: "quantize",
    rounding.dequantize: "dequantize",
    fake_quantize_dynamically: "dynamic",
    torch.ops.compression_manager.fake_quantize: "fake_quantize",
    torch.ops.compression_manager.quantize: "quantize",
    torch.ops.compression_manager.dequantize: "dequantize",
}


def quantizer_operation(quantizer: FakeQuantizer, input: Tensor, ids: TensorIds) -> FakeQuantizeOp:
    """Return the line of `quantizer`, with the numbers that it has now; none is `auto`."""
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    if not quantizer.scheme.dynamic:
        try:
            parameters = quantizer.quantization_parameters(input)
            scale, zero_point = _copied(parameters.scale), _copied(parameters.zero_point)
        except QuantizationError:
            pass  # nothing was observed yet
    return _operation_of_scheme(input, quantizer.scheme, scale, zero_point, ids)


def arithmetic_operation(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    outputs: Sequence[Tensor],
    ids: TensorIds,
) -> Operation | None:
    """Return the line of a function of `rounding`, or of its operator; None for all others."""
    name = _ARITHMETIC.get(getattr(function, "_overloadpacket", function))
    if name is None or len(outputs) != 1:
        return None
    values = bound_arguments(function, args, kwargs)
    if name == "dynamic":
        return _operation_of_scheme(values["input"], values["scheme"], None, None, ids)
    if name == "fake_quantize":
        scale, zero_point = _copied(values["scale"]), _copied(values["zero_point"])
        return _operation_of_scheme(values["input"], _scheme(values), scale, zero_point, ids)
    source = values["quantized" if name == "dequantize" else "input"]
    input_id = ids.id_of(source)
    parts = [
        f"t{input_id}",
        f"scale={format_scale(values['scale'])}",
        f"zero_point={format_zero_point(values['zero_point'])}",
    ]
    parts += [
        f"{option}={values[option]}"
        for option in ("axis", "group_size")
        if values[option] is not None
    ]
    return TensorOp(
        "Quantize" if name == "quantize" else "Dequantize",
        (input_id,),
        ids.next_id(),
        tuple(outputs[0].shape),
        format_dtype(outputs[0].dtype),
        ", ".join(parts),
    )


def _operation_of_scheme(
    input: Tensor, scheme: QuantizationScheme, scale: Any, zero_point: Any, ids: TensorIds
) -> FakeQuantizeOp:
    input_id = ids.id_of(input)
    return FakeQuantizeOp.of_scheme(
        input_id,
        ids.next_id(),
        tuple(input.shape),
        scheme,
        scale,
        zero_point,
        dtype=format_dtype(input.dtype),
    )


def _scheme(values: Mapping[str, Any]) -> QuantizationScheme:
    """Return the scheme with the given range; symmetric if the zero point says so as well."""
    low, high = values["quant_min"], values["quant_max"]
    granularity = _granularity(values)
    options = {
        "bits": (high - low).bit_length(),
        "granularity": granularity,
        "axis": values["axis"],
        "group_size": values["group_size"],
        "dynamic": granularity == "token",
    }
    # One bit, symmetric, is 0 and 1 of either sign.
    symmetric = QuantizationScheme(**options, signed=low < 0 or high == 1)
    zero_points = torch.as_tensor(values["zero_point"])
    centred = bool((zero_points == symmetric.symmetric_zero_point).all())
    if centred and (symmetric.quant_min, symmetric.quant_max) == (low, high):
        return symmetric
    narrow = high - low + 1 < 1 << options["bits"]
    return QuantizationScheme(
        **options, symmetric=False, signed=low < 0, narrow_range=narrow or None
    )


def _granularity(values: Mapping[str, Any]) -> str:
    if values["axis"] is not None:
        return "channel"
    if values["group_size"] is not None:
        return "group"
    scale = values["scale"]
    return "token" if isinstance(scale, Tensor) and scale.numel() > 1 else "tensor"


def _copied(value: Any) -> Any:
    """Return a number as Python's own, several as a tensor of their own."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.numel() == 1 else value.detach().clone()
