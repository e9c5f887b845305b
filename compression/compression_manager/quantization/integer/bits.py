"""Masks as one bit per element, in the order of the elements in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.quantization.integer.parts import parts

_BYTE = 8
# Elements whose bits are one integer of 64 bits.
_WORD = 64
# Elements of a vector from which on it pays to search for the few that are marked.
MANY = 1 << 16
# The product with this number gathers the lowest bits of eight bytes in the highest byte. It
# reads bytes of 0 and 1 as one integer whose first byte is the least significant.
_GATHER = 0x0102040810204080
# The product with this number copies a byte into all eight bytes.
_COPIES = 0x0101010101010101
# Bit i of byte i, counted from the least significant; as a number with a sign.
_OWN_BIT = 0x8040201008040201 - (1 << 64)


def pack_mask(mask: Tensor) -> Tensor:
    """Return `mask` (bool, any number of elements, in their order) as uint8 (ceil(n / 8),).

    Element i is bit i % 8, counted from the least significant, of byte i // 8.
    """
    flat = mask.reshape(-1).view(torch.uint8)
    if not flat.numel():
        return flat
    missing = -flat.numel() % _BYTE
    if missing:
        flat = F.pad(flat, (0, missing))
    # The wanted byte is the highest of the product; the shift keeps its sign, the cast drops it.
    return (flat.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def pack_nonzero(values: Tensor) -> Tensor:
    """Return `pack_mask` of whether each value is not zero, as one that is no number is."""
    return pack_mask(values.to(torch.bool))  # faster than "!="


def spread_mask(bits: Tensor, count: int) -> Tensor:
    """Return the `count` elements of the mask that `pack_mask` took: int32 (count,).

    An integer has all bits set where the mask is true, and none where it is not, so that the bits
    of a float32 are kept or cleared by "and", which is faster than choosing by a bool.
    """
    # Eight copies of each byte, of which each keeps its own bit.
    spread = (bits.to(torch.int64) * _COPIES).bitwise_and_(_OWN_BIT)
    signs = spread.view(torch.uint8).to(torch.bool).view(torch.int8).neg_()
    return signs.to(torch.int32)[:count]


def mask_bytes(elements: Tensor) -> int:
    """Return how many bytes hold a bit for each of the elements."""
    return -(-elements.numel() // _BYTE)


def no_bits(flat: Tensor) -> Tensor:
    """Return a bit for each element, which is 0: uint8 (ceil(n / 8),)."""
    return flat.new_zeros(mask_bytes(flat), dtype=torch.uint8)


def bytes_of(part: slice) -> slice:
    """Return the bytes that hold the bits of a part, which begins with a full byte."""
    return slice(part.start // _BYTE, -(-part.stop // _BYTE))


def keep_marked(values: Tensor, bits: Tensor, *, out: Tensor) -> None:
    """Write each of `values` whose bit is 1 to `out`, and zero for the others; float32 (n,)."""
    mask = spread_mask(bits, values.numel())
    torch.bitwise_and(values.view(torch.int32), mask, out=out.view(torch.int32))


def clear_marked(values: Tensor, bits: Tensor) -> None:
    """Zero each of `values` whose bit is 1, in place; float32 (n,)."""
    if values.device.type == "cpu" and values.numel() >= MANY:
        words = bits[: values.numel() // _WORD * _BYTE].view(torch.int64)
        found = words.nonzero().squeeze(1)
        if len(found) * _WORD < values.numel() // 4:
            _clear_found(values, bits, found)
            return
    for part in parts(values):
        keep_marked(values[part], bits[bytes_of(part)].bitwise_not(), out=values[part])


def _clear_found(values: Tensor, bits: Tensor, found: Tensor) -> None:
    """Do what `clear_marked` does, where of the full words only those found have a bit.

    The elements behind the last full word are always looked at.
    """
    whole = values.numel() // _WORD * _WORD
    words = values[:whole].view(-1, _WORD)
    cleared = words.index_select(0, found)
    marked = bits[: whole // _BYTE].view(-1, _BYTE).index_select(0, found)
    keep_marked(cleared.view(-1), marked.view(-1).bitwise_not_(), out=cleared.view(-1))
    words.index_copy_(0, found, cleared)
    keep_marked(values[whole:], bits[whole // _BYTE :].bitwise_not(), out=values[whole:])
