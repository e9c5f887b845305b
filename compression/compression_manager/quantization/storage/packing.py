"""Integers of one to seven bits as a stream of bytes, without gaps between them.

Value i takes the bits i * bits to (i + 1) * bits - 1 of the stream; bit k of the stream is bit
k % 8 of byte k // 8, counted from the least significant. Two 4-bit values share a byte, the first
in its lower half. Bits after the last value are zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic.overridable import overridable
from compression_manager.quantization.exporting import is_exporting

_BYTE = 8


def packed_length(count: int, bits: int) -> int:
    """Return how many bytes `count` values of `bits` bits take."""
    return -(-count * bits // _BYTE)


def packing_period(bits: int) -> tuple[int, int]:
    """Return after how many values, and bytes, value and byte begin together again."""
    common = math.gcd(bits, _BYTE)
    return _BYTE // common, bits // common


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Return `values` as a stream of bytes.

    Args:
        values: uint8, any shape, each from 0 to 2^bits - 1; taken in row-major order.
        bits: 1 to 7.

    Returns:
        uint8, (packed_length(values.numel(), bits),).

    Raises:
        QuantizationError: another dtype or number of bits.
    """
    _check(values, bits)
    count = values.numel()
    period, width = packing_period(bits)
    columns = F.pad(values.reshape(-1), (0, -count % period)).reshape(-1, period)
    packed = columns.new_zeros(columns.shape[0], width)
    for index in range(period):
        byte, shift = divmod(index * bits, _BYTE)
        packed[:, byte] |= columns[:, index] << shift
        if shift + bits > _BYTE:
            packed[:, byte + 1] |= columns[:, index] >> (_BYTE - shift)
    # A copy, so that no padding stays alive behind the result.
    return packed.reshape(-1)[: packed_length(count, bits)].clone()


@overridable
def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the values that `pack_bits` took.

    While torch.export traces, this is one operator `compression_manager::unpack_bits`.

    Args:
        packed: uint8, (*, packed_length(count, bits)): one stream, or several of equal length.
        bits: 1 to 7.
        count: number of values in each stream.

    Returns:
        uint8, (*, count).

    Raises:
        QuantizationError: another dtype, number of bits or length.
    """
    _check(packed, bits)
    length = packed_length(count, bits)
    if packed.shape[-1:] != (length,):
        raise QuantizationError(
            f"{count} values of {bits} bits are packed into {length} bytes, got a tensor of shape "
            f"{tuple(packed.shape)}."
        )
    unpack = _unpack_operator if is_exporting() else _unpack
    return unpack(packed, bits, count)


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    *streams, length = packed.shape
    period, width = packing_period(bits)
    if length % width:
        packed = F.pad(packed, (0, -length % width))
    groups = packed.reshape(*streams, -(-length // width), width)
    mask = (1 << bits) - 1
    columns = []
    for index in range(period):
        byte, shift = divmod(index * bits, _BYTE)
        value = groups[..., byte] >> shift
        if shift + bits > _BYTE:
            value = value | (groups[..., byte + 1] << (_BYTE - shift))
        columns.append(value & mask)
    return torch.stack(columns, -1).flatten(-2)[..., :count]


@torch.library.custom_op("compression_manager::unpack_bits", mutates_args=())
def _unpack_operator(packed: Tensor, bits: int, count: int) -> Tensor:
    return _unpack(packed, bits, count).contiguous()


@_unpack_operator.register_fake
def _(packed: Tensor, bits: int, count: int) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], count)


def _check(tensor: Tensor, bits: int) -> None:
    if tensor.dtype != torch.uint8:
        raise QuantizationError(f"packed bits are uint8 tensors, got {tensor.dtype}.")
    if not 1 <= bits < _BYTE:
        raise QuantizationError(f"values of 1 to 7 bits are packed, got bits={bits}.")
