"""States taken apart and put together again, exactly."""

import datetime
import json
import math
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import IntEnum

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression_manager.errors import CheckpointCorruptError, CheckpointError
from compression_manager.state import flatten, unflatten


def round_trip(state):
    document, tensors = flatten(state)
    return unflatten(json.loads(json.dumps(document, allow_nan=False)), tensors)


def same(left, right):
    """Equality of types, values, order, dtypes, strides and bytes, written without our code."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.stride() == right.stride()
            and raw(left) == raw(right)
        )
    if isinstance(left, np.ndarray | np.generic):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same(a, b) and same(left[a], right[b]) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return repr(left) == repr(right)
    return left == right


def raw(tensor):
    plain = tensor.contiguous().reshape(-1)
    return bytes(plain.view(torch.uint8).tolist()) if plain.numel() else b""


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    count = math.prod(shape)
    content = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype is torch.bool:
        content = bytes(byte % 2 for byte in content)
    flat = (
        torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0).to(dtype)
    )
    return flat.reshape(shape).permute(order)


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9)
)
arrays = st.sampled_from(["<u4", ">f8", "?", "<c16", "<f2", "<U3", "S2", "<M8[ns]"]).flatmap(
    lambda dtype: st.lists(st.integers(0, 1), max_size=4).map(
        lambda values: np.array(values).astype(dtype)
    )
)
leaves = scalars | tensors() | arrays | arrays.filter(len).map(lambda array: array[0])
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.sampled_from(["$tensor", "$"]), inner, max_size=3)
        | st.dictionaries(scalars, inner, max_size=3)
        | st.dictionaries(scalars, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(scalars, st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(states)
def test_any_state_comes_back_exactly(state):
    assert same(state, round_trip(state))


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        -(10**5000),
        -(2**63),
        2**53 + 1,
        float("nan"),
        float("-inf"),
        -0.0,
        5e-324,
        0.1,
        "\ud800 \0 é",
        b"\xff\x00",
        {1: "int", "1": "str", None: 0, b"1": 1, 0.5: 2, np.int64(7): 3},
        {"$tensor": "not a tag"},
        {"a/b": torch.zeros(2), "a": {"b": torch.ones(2)}},
        {"\ud800": torch.zeros(2)},
        torch.tensor(3.0),
        torch.empty(0, 3),
        np.float64(0.1),
        np.bool_(True),
        np.array(5),
        np.str_("é"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_awkward_values(value):
    assert same(value, round_trip(value))


def test_every_dtype_of_safetensors_survives_a_file(tmp_path):
    from compression_manager.state import read_checkpoint, write_checkpoint

    state = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in DTYPES}
    state["__metadata__"] = torch.ones(1)  # a name that safetensors keeps for itself
    write_checkpoint(tmp_path / "c", state)
    assert same(state, read_checkpoint(tmp_path / "c"))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1)])
def test_channels_last_is_preserved_even_where_sizes_are_one(shape):
    tensor = torch.randn(shape).to(memory_format=torch.channels_last)
    document, stored = flatten(tensor)
    assert all(item.is_contiguous() for item in stored.values())
    restored = unflatten(document, stored)
    assert restored.stride() == tensor.stride()
    assert torch.equal(restored, tensor)


def test_other_software_reads_logical_values_of_channels_last_tensors():
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    _, stored = flatten({"w": tensor})
    assert stored["w"].tolist() == tensor.tolist()


def test_tied_weights_are_stored_once_and_stay_tied():
    weight = torch.randn(3, 3)
    document, stored = flatten({"embedding": weight, "head": weight.view(3, 3)})
    assert len(stored) == 1
    restored = unflatten(document, stored)
    restored["head"][0, 0] = 7.0
    assert restored["embedding"][0, 0] == 7.0


def test_tied_weights_of_other_strides_stay_tied():
    kernel = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    restored = round_trip({"first": kernel, "second": kernel})
    restored["second"].zero_()
    assert not restored["first"].any()
    assert restored["first"].stride() == kernel.stride()


def test_different_views_of_one_memory_do_not_share_it_in_the_file(tmp_path):
    from compression_manager.state import read_checkpoint, write_checkpoint

    flat = torch.arange(6.0)
    state = {"all": flat, "head": flat[:2], "tail": flat[2:], "turned": flat.view(2, 3).t()}
    write_checkpoint(tmp_path / "c", state)
    restored = read_checkpoint(tmp_path / "c")
    assert {k: v.tolist() for k, v in restored.items()} == {k: v.tolist() for k, v in state.items()}
    restored["all"].zero_()
    assert restored["tail"].tolist() == [2.0, 3.0, 4.0, 5.0]


def test_views_with_gaps_and_overlaps_are_compacted():
    state = {"gap": torch.arange(6).view(2, 3)[:, :2], "overlap": torch.ones(1).expand(4)}
    document, stored = flatten(state)
    restored = unflatten(document, stored)
    assert restored["gap"].tolist() == [[0, 1], [3, 4]]
    assert restored["overlap"].tolist() == [1.0] * 4
    assert restored["overlap"].untyped_storage().nbytes() == 16


def test_parameters_conjugates_and_gradients_come_back_as_plain_tensors():
    value = torch.tensor([1 + 2j], dtype=torch.complex64).conj()
    restored = round_trip({"p": torch.nn.Parameter(torch.ones(2)), "c": value})
    assert type(restored["p"]) is torch.Tensor
    assert not restored["p"].requires_grad
    assert restored["c"].tolist() == [1 - 2j]


def test_a_tensor_and_its_conjugate_or_negative_are_two():
    value = torch.tensor([1 + 2j, 3 - 4j])
    negative = value.conj().imag
    assert negative.is_neg()
    restored = round_trip([value, value.conj(), value.imag, negative])
    expected = [[1 + 2j, 3 - 4j], [1 - 2j, 3 + 4j], [2.0, -4.0], [-2.0, 4.0]]
    assert [tensor.tolist() for tensor in restored] == expected


def test_module_state_keeps_its_module_versions():
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict()
    restored = round_trip({"model": state})["model"]
    assert type(restored) is OrderedDict
    assert restored._metadata == state._metadata
    assert restored._metadata["0"]["version"] == 2


def test_scheduler_that_counts_milestones_continues():
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 2])

    (opt, scheduler), (opt2, other) = make(), make()
    opt.step(), scheduler.step()
    opt2.load_state_dict(round_trip(opt.state_dict()))
    other.load_state_dict(round_trip(scheduler.state_dict()))
    opt.step(), scheduler.step()
    opt2.step(), other.step()
    assert other.get_last_lr() == scheduler.get_last_lr() == pytest.approx([0.001])


def test_fortran_order_is_preserved():
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    restored = round_trip(array)
    assert restored.flags.f_contiguous
    assert np.array_equal(restored, array)
    restored[0, 0] = 1.0  # own, writable memory


class Colour(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        defaultdict(list),
        Colour.RED,
        namedtuple("Pair", "a b")(1, 2),
        datetime.date(2020, 1, 1),
        1j,
        bytearray(b"x"),
        np.array([object()]),
        np.ma.masked_array([1], [True]),
        np.zeros(1, dtype=[("a", "i4")]),
        torch.ones(1, dtype=torch.complex128),
        torch.ones(1, device="meta"),
        torch.ones(2, 2).to_sparse(),
        {(1, 2): 3},
    ],
    ids=lambda value: type(value).__name__,
)
def test_unknown_types_are_refused_with_their_key_path(value):
    with pytest.raises(CheckpointError, match="plugins/mine/1"):
        flatten({"plugins": {"mine": [0, value]}})


def test_a_state_that_contains_itself_is_refused():
    state: dict = {}
    state["again"] = state
    with pytest.raises(CheckpointError, match="contains itself"):
        flatten(state)


def test_deepest_allowed_state_can_be_read_again():
    state: object = {0: 1}
    for _ in range(62):
        state = OrderedDict({0: state})
    assert round_trip(state) == state


def test_64_levels_are_the_most():
    state: object = 1
    for _ in range(64):
        state = [state]
    assert round_trip(state) == state
    with pytest.raises(CheckpointError, match="deeper than 64 levels"):
        flatten([state])


@pytest.mark.parametrize(
    "document",
    [
        {"$unknown": 1},
        {"$tuple": [1], "other": 2},
        {"$tuple": "ab"},
        {"$tensor": "missing"},
        {"$tensor": []},
        {"$strided_tensor": {"name": "t", "strides": [10**12, 1]}},
        {"$strided_tensor": {"name": "t", "strides": [4, 1]}},
        {"$strided_tensor": {"name": "t", "strides": [-3, 1]}},
        {"$strided_tensor": {"name": "t", "strides": [1]}},
        {"$dict": [[[1], 2]]},
        {"$dict": [[1]]},
        {"$dict": 3},
        {"$ordered_dict": [1]},
        {"$ordered_dict": [1, 2, 3]},
        {"$counter": [1]},
        {"$int": "x"},
        {"$int": 3.5},
        {"$float": "x"},
        {"$bytes": "?"},
        {"$bytes": 3},
        {"$array": {"name": "u", "dtype": "O", "shape": [1], "order": "C"}},
        {"$array": {"name": "u", "dtype": "<f8", "shape": [10**9], "order": "C"}},
        {"$array": {"name": "u", "dtype": "<f8", "shape": [0], "order": "C"}},
        {"$array": {"name": "t", "dtype": "<f8", "shape": [1], "order": "C"}},
        {"$array": {"name": "u"}},
        {"$array": {"name": "v", "dtype": "|u1", "shape": [6], "order": "C"}},
        {"$scalar": {"dtype": "<f8", "bytes": "00"}},
        {"$scalar": {"dtype": "nonsense", "bytes": "00"}},
        {"$scalar": []},
    ],
    ids=str,
)
def test_foreign_documents_are_refused(document):
    byte = {"dtype": torch.uint8}
    stored = {"t": torch.ones(2, 3), "u": torch.zeros(8, **byte), "v": torch.zeros(2, 3, **byte)}
    with pytest.raises(CheckpointCorruptError):
        unflatten({"a": [document]}, stored)


def test_deep_documents_are_refused():
    document: list = []
    for _ in range(100_000):
        document = [document]
    with pytest.raises(CheckpointCorruptError):
        unflatten(document, {})
    while document:  # take it apart, for its destructor recurses
        document = document.pop()
