"""Masks of one bit per element."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from compression_manager.quantization.integer.bits import pack_mask, spread_mask


@given(arrays.arrays(bool, st.integers(0, 70)))
def test_bits_are_those_of_numpy(mask: np.ndarray) -> None:
    packed = pack_mask(torch.from_numpy(mask))
    assert np.array_equal(packed.numpy(), np.packbits(mask, bitorder="little"))
    spread = spread_mask(packed, len(mask))
    assert spread.dtype == torch.int32
    assert np.array_equal(spread.numpy(), np.where(mask, -1, 0))


def test_elements_are_taken_in_row_major_order() -> None:
    mask = torch.tensor([[True, False, False], [False, False, True]])
    assert pack_mask(mask).tolist() == [0b100001]
