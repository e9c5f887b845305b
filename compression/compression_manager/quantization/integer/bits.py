"""Masks as one bit per element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BYTE = 8
# The product with this number gathers the lowest bits of eight bytes in the highest byte. It
# reads bytes of 0 and 1 as one integer whose first byte is the least significant.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_CARRY = 0x7F7F7F7F7F7F7F7F
_SELECT = torch.iinfo(torch.int64).min | 0x0040201008040201


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
    return (flat.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def unpack_mask(bits: Tensor, count: int) -> Tensor:
    """Return the `count` elements of the mask that `pack_mask` took: bool (count,)."""
    spread = bits.to(torch.int64) * _SPREAD & _SELECT
    # Any bit of a byte, plus 127, sets its highest; comparing bytes with zero takes much longer.
    ones = spread + _CARRY >> 7 & _SPREAD
    return ones.view(torch.bool)[:count]
