"""Bit streams against numpy's own packing of single bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compression_manager.errors import QuantizationError
from compression_manager.quantization.storage import pack_bits, unpack_bits


@st.composite
def streams(draw):
    bits = draw(st.integers(1, 7))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    elements = st.integers(0, 2**bits - 1)
    return bits, draw(hnp.arrays(np.uint8, shape, elements=elements))


def packed_by_numpy(values, bits):
    """Every value as its single bits, lowest first, and these as bytes, lowest first."""
    single = np.unpackbits(values.reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    return np.packbits(single.reshape(-1), bitorder="little")


@settings(deadline=None, max_examples=300)
@given(streams())
def test_equals_numpy(stream):
    bits, values = stream
    packed = pack_bits(torch.from_numpy(values), bits)
    expected = packed_by_numpy(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == expected.shape
    np.testing.assert_array_equal(packed.numpy(), expected)
    unpacked = unpack_bits(torch.from_numpy(expected), bits, values.size)
    assert unpacked.dtype == torch.uint8
    np.testing.assert_array_equal(unpacked.numpy(), values.reshape(-1))


def test_layout_of_four_and_three_bits():
    nibbles = torch.tensor([0x1, 0x2, 0xF], dtype=torch.uint8)
    assert pack_bits(nibbles, 4).tolist() == [0x21, 0x0F]
    # 001, 010, 111 from the lowest bit on: 1 11 010 001 is 0xD1 and the ninth bit is the next's.
    assert pack_bits(torch.tensor([1, 2, 7], dtype=torch.uint8), 3).tolist() == [0xD1, 0x01]


def test_non_contiguous_values_are_taken_in_row_major_order():
    values = torch.arange(12, dtype=torch.uint8).reshape(3, 4).t()
    assert torch.equal(unpack_bits(pack_bits(values, 4), 4, 12), values.reshape(-1))


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 17])
def test_several_streams_are_unpacked_at_once(bits, count):
    values = torch.randint(1 << bits, (2, 3, count), dtype=torch.uint8)
    packed = torch.stack([pack_bits(stream, bits) for stream in values.flatten(0, 1)])
    unpacked = unpack_bits(packed.unflatten(0, (2, 3)), bits, count)
    assert torch.equal(unpacked, values)


class Unpacked(torch.nn.Module):
    def forward(self, packed):
        return unpack_bits(packed, 3, 11)


@pytest.mark.parametrize("shape", [(5,), (4, 5)])
def test_exports_as_one_operator(shape):
    packed = torch.randint(256, shape, dtype=torch.uint8)
    program = torch.export.export(Unpacked(), (packed,))
    assert torch.equal(program.module()(packed), unpack_bits(packed, 3, 11))
    torch.library.opcheck(torch.ops.compression_manager.unpack_bits.default, (packed, 3, 11))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["compression_manager.unpack_bits.default"]


def test_packed_bytes_own_their_memory():
    assert pack_bits(torch.ones(9, dtype=torch.uint8), 5).untyped_storage().nbytes() == 6


@pytest.mark.parametrize("bits", [0, 8, -1])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(QuantizationError, match=f"1 to 7 bits are packed, got bits={bits}"):
        pack_bits(torch.zeros(4, dtype=torch.uint8), bits)


def test_other_dtypes_and_lengths_are_refused():
    with pytest.raises(QuantizationError, match=r"uint8 tensors, got torch.int64"):
        pack_bits(torch.zeros(4, dtype=torch.int64), 4)
    with pytest.raises(QuantizationError, match=r"5 values of 3 bits are packed into 2 bytes.*3,"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 5)
