"""Masks as one bit per element."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_BYTE = 8
# The product with this number gathers the lowest bits of eight bytes in the highest byte. It
# reads bytes of 0 and 1 as one integer whose first byte is the least significant.
_GATHER = 0x0102040810204080


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


def spread_mask(bits: Tensor, count: int) -> Tensor:
    """Return the `count` elements of the mask that `pack_mask` took: int32 (count,).

    An integer has all bits set where the mask is true, and none where it is not, so that the bits
    of a float32 are kept or cleared by "and", which is faster than choosing by a bool.
    """
    return _masks_of_bytes(bits.device).index_select(0, bits.to(torch.int32)).view(-1)[:count]


@cache
def _masks_of_bytes(device: torch.device) -> Tensor:
    """Return the masks of all bytes: int32 (256, 8)."""
    bytes = torch.arange(256, dtype=torch.int32, device=device)
    places = torch.arange(_BYTE, dtype=torch.int32, device=device)
    return -(bytes[:, None] >> places & 1)
