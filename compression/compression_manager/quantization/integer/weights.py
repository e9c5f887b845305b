"""Integers of weights that are being trained, computed anew only if the weight changed.

Changes are seen by autograd's counter, by the steps of torch's optimizers, by the hook that calls
`forget_trained_weights`, and, because fused optimizers and what is written through `.data` leave no
trace in that counter, by a sample of the values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef

from compression_manager.quantization.arithmetic import kernels, rounding
from compression_manager.quantization.arithmetic.parameters import compute_qparams
from compression_manager.quantization.integer.bits import pack_mask
from compression_manager.quantization.integer.operands import IntegerWeight
from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.scratch import claim, hold
from compression_manager.quantization.observers.extremes import gives_own_range
from compression_manager.quantization.quantizers.quantizer_module import (
    FakeQuantizer,
    ObservedFakeQuantizer,
)
from compression_manager.quantization.tensors.changes import sample_of, version_of
from compression_manager.quantization.tensors.memory_format import dense, in_memory_order


@dataclass(eq=False, slots=True)
class _Known:
    """The integers of a weight, and what it was when they were computed.

    Attributes:
        base: the tensor that the weight is, or a view of. Addresses are used again; it is not.
        state: what changes with the weight.
        sample: some of its values.
        is_trained: whether it requires a gradient.
        integers: what was computed.
    """

    base: TensorWeakRef
    state: tuple[object, ...]
    sample: list[float]
    is_trained: bool
    integers: IntegerWeight


_weights: WeakKeyDictionary[ObservedFakeQuantizer, _Known] = WeakKeyDictionary()


def integer_weight(
    quantizer: ObservedFakeQuantizer, weight: Tensor, passes: Passes, *, values: bool = False
) -> IntegerWeight:
    """Return the integers of `weight`, computed anew only if it changed.

    Args:
        quantizer: quantizes already, with a scheme that `why_no_integer_weight` accepts.
        weight: float32, (rows, ...).
        values: whether the real numbers of the integers are asked for next, so that they may be
            computed along with them.
    """
    base = weight if weight._base is None else weight._base
    state = (
        version_of(base), weight.data_ptr(), weight.shape, weight.stride(), passes.name,
    )  # fmt: skip
    known, sample = _weights.get(quantizer), sample_of(weight.detach())
    if (
        known is not None
        and known.base() is base
        and known.state == state
        and known.sample == sample
    ):
        return known.integers
    # Or they could not be kept for a backward pass later.
    with torch.inference_mode(False):
        computed = _quantize_weight(quantizer, weight.detach(), passes, values)
    _watch_optimizers()
    _weights[quantizer] = _Known(TensorWeakRef(base), state, sample, weight.requires_grad, computed)
    return computed


def quantizes_rows(quantizer: ObservedFakeQuantizer) -> bool:
    """Return whether each row of a weight is quantized by itself, with its own range."""
    return (
        gives_own_range(quantizer.observer)
        and quantizer.scheme.granularity == "channel"
        and (quantizer.scheme.quant_min, quantizer.scheme.quant_max) == (-127, 127)
    )


def forget_weights(quantizers: Iterable[FakeQuantizer]) -> None:
    """Compute the integers of the weights of these quantizers anew in their next forward pass."""
    for quantizer in quantizers:
        if isinstance(quantizer, ObservedFakeQuantizer):
            _weights.pop(quantizer, None)


def forget_trained_weights() -> None:
    """Compute the integers of all weights that are trained anew in their next forward pass."""
    for quantizer, known in list(_weights.items()):
        if known.is_trained:
            del _weights[quantizer]


@cache
def _watch_optimizers() -> None:
    """Forget weights whenever an optimizer has made a step; for this process, once."""
    register_optimizer_step_post_hook(_forget_stepped)


def _forget_stepped(optimizer: Optimizer, *_: object) -> None:
    # A compiled step leaves its trace.
    if torch.compiler.is_compiling():
        return
    # Also of weights that it does not have: it may have shards (FSDP), or a copy to be copied back.
    forget_trained_weights()
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for quantizer, known in list(_weights.items()):
        if id(known.base()) in stepped:
            del _weights[quantizer]


def _quantize_weight(
    quantizer: ObservedFakeQuantizer, weight: Tensor, passes: Passes, values: bool
) -> IntegerWeight:
    if quantizes_rows(quantizer) and weight.numel():
        # The range of such an observer is the weight's own, so that nothing is outside of it.
        weight = dense(weight)
        memory = claim(weight, torch.float32, "weight") if values else None
        codes, scale = passes.quantize_rows(weight, memory)
        if memory is not None:
            hold("weight", codes, memory)
        return IntegerWeight(codes, scale, None)
    scheme, rows = quantizer.scheme, weight.shape[0]
    scale, zero_point = compute_qparams(*quantizer.observer.compute_range(weight), scheme)
    numbers = scale, zero_point, scheme.quant_min, scheme.quant_max, scheme.axis
    weight = dense(weight)
    codes = rounding.quantize(weight, *numbers)
    clipped = in_memory_order(kernels.is_clipped(weight, *numbers))
    any_clipped = weight.device.type != "cpu" or bool(clipped.any())
    return IntegerWeight(
        codes, scale.expand(rows).contiguous(), pack_mask(clipped) if any_clipped else None
    )
