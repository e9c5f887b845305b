"""What is stored of one output, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression_manager import ConfigError
from compression_plugins.distillation.cache.encoding import Encoding

CLASSES = 12
outputs = st.builds(
    lambda seed, scale, shift: (
        torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(seed)) * scale + shift
    ),
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 10.0]),
    st.sampled_from([-20.0, 0.0, 3.0]),
)


def _softmax(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    values = np.exp(
        (logits.double().numpy() - logits.double().numpy().max(-1, keepdims=True)) / temperature
    )
    return values / values.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_classes_in_float32_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    logits = (torch.randn(7, 3, CLASSES) * 30).to(dtype)
    encoding = Encoding(None, "float32")
    assert torch.equal(encoding.decode(encoding.encode(logits), CLASSES), logits.float())


@pytest.mark.parametrize(("classes", "bytes_per_index"), [(2**15, 2), (2**15 + 1, 4)])
def test_an_index_takes_two_bytes_while_the_last_class_has_room_in_them(
    classes: int, bytes_per_index: int
) -> None:
    logits = torch.zeros(1, classes)
    logits[0, -1] = 1.0
    encoding = Encoding(1, "float32")
    parts = encoding.encode(logits)
    assert int(parts["indices"]) == classes - 1
    assert parts["indices"].element_size() == bytes_per_index
    assert encoding.bytes_per_sample((classes,)) == sum(part.nbytes for part in parts.values())


@given(outputs)
def test_float16_is_off_by_half_a_unit_in_the_last_place(logits: torch.Tensor) -> None:
    encoding = Encoding(None, "float16")
    decoded = encoding.decode(encoding.encode(logits), CLASSES).double().numpy()
    exact = logits.double().numpy()
    assert (np.abs(decoded - exact) <= np.abs(exact) * 2.0**-11 + 2.0**-25).all()


@given(outputs)
def test_int8_is_off_by_half_a_step_of_its_own_range(logits: torch.Tensor) -> None:
    encoding = Encoding(None, "int8")
    decoded = encoding.decode(encoding.encode(logits), CLASSES).double().numpy()
    exact = logits.double().numpy()
    step = (exact.max(-1) - exact.min(-1)) / 255
    # And by the rounding of float32, which counts where the offset is large.
    assert (np.abs(decoded - exact) <= 0.501 * step[:, None] + np.abs(exact) * 2.0**-22).all()


@pytest.mark.parametrize("offset", [20.0, 100.0, 1000.0])
def test_int8_loses_nothing_by_an_offset(offset: float) -> None:
    logits = torch.randn(200, CLASSES, generator=torch.Generator().manual_seed(0))
    encoding = Encoding(None, "int8")
    plain, moved = (
        encoding.decode(encoding.encode(item), CLASSES) for item in (logits, logits + offset)
    )
    assert torch.equal(moved.argmax(-1), (logits + offset).argmax(-1))
    np.testing.assert_allclose(_softmax(moved), _softmax(plain), rtol=0.02)


def test_a_row_of_one_value_comes_back() -> None:
    logits = torch.tensor([[3.5] * 4, [0.0] * 4, [-1e30] * 4])
    encoding = Encoding(None, "int8")
    assert torch.equal(encoding.decode(encoding.encode(logits), 4), logits)


@given(outputs, st.integers(1, CLASSES - 1))
def test_top_k_keeps_probabilities_and_the_mass_of_the_others(logits: torch.Tensor, k: int) -> None:
    encoding = Encoding(k, "float32")
    parts = encoding.encode(logits)
    exact, stored = _softmax(logits), _softmax(encoding.decode(parts, CLASSES))
    kept = parts["indices"].long().numpy()  # of equal logits any may be kept
    assert np.array_equal(np.take_along_axis(exact, kept, -1), -np.sort(-exact, -1)[:, :k])
    np.testing.assert_allclose(
        np.take_along_axis(stored, kept, -1), np.take_along_axis(exact, kept, -1), rtol=2e-5
    )
    rest = np.ones_like(exact, dtype=bool)
    np.put_along_axis(rest, kept, False, -1)
    spread = stored[rest].reshape(len(exact), -1)
    np.testing.assert_allclose(spread.sum(-1), (exact * rest).sum(-1), rtol=2e-5)
    np.testing.assert_allclose(spread, np.broadcast_to(spread[:, :1], spread.shape), rtol=1e-6)


@pytest.mark.parametrize(("temperature", "sign"), [(0.5, -1), (1.0, 0), (4.0, 1)])
def test_temperature_moves_the_mass_of_the_others_as_documented(
    temperature: float, sign: int
) -> None:
    logits = torch.randn(20, CLASSES, generator=torch.Generator().manual_seed(0)) * 3
    encoding = Encoding(3, "float32")
    decoded = encoding.decode(encoding.encode(logits), CLASSES)
    top = np.argsort(-logits.numpy(), -1)[:, :3]
    exact, stored = (
        1 - np.take_along_axis(_softmax(item, temperature), top, -1).sum(-1)
        for item in (logits, decoded)
    )
    difference = stored - exact
    assert np.abs(difference).max() < 1e-6 if sign == 0 else np.abs(difference).max() > 1e-3
    assert sign == 0 or (difference * sign > -1e-6).all()


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("shape", [(CLASSES,), (7, CLASSES), (40000,)])
def test_the_announced_size_is_the_real_one(
    top_k: int | None, dtype: str, shape: tuple[int, ...]
) -> None:
    encoding = Encoding(top_k, dtype)
    parts = encoding.encode(torch.randn(3, *shape))
    assert sum(part.nbytes for part in parts.values()) == 3 * encoding.bytes_per_sample(shape)


@pytest.mark.parametrize("classes", [2**15, 2**15 + 1])
def test_the_last_class_can_be_kept(classes: int) -> None:
    logits = torch.zeros(1, classes)
    logits[0, -1] = 5.0
    encoding = Encoding(1, "float32")
    assert encoding.decode(encoding.encode(logits), classes).argmax() == classes - 1


def test_a_logit_beyond_float16_is_refused() -> None:
    with pytest.raises(ConfigError, match="reach 70000; use 'float32' or 'int8'"):
        Encoding(None, "float16").encode(torch.tensor([[1.0, -70000.0]]))


def test_a_logit_beyond_float32_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dtype is 'float32', which ends at 3\.40282e\+38"):
        Encoding(None, "float32").encode(torch.tensor([[1.0, 1e300]], dtype=torch.float64))


def test_a_top_k_of_images_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"hardly holds the classes of logits of shape \(2, 5, 4, 9"
    ):
        Encoding(3, "float32").encode(torch.randn(2, 5, 4, 9))


@pytest.mark.parametrize("top_k", [CLASSES, CLASSES + 1])
def test_a_top_k_that_leaves_nothing_out_is_refused(top_k: int) -> None:
    with pytest.raises(ConfigError, match="predicts 12 classes"):
        Encoding(top_k, "float32").encode(torch.randn(2, CLASSES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, "float32"), "top_k must be an integer of at least 1"),
        ((None, "float61"), "dtype got 'float61'; did you mean 'float16'"),
    ],
)
def test_bad_options_are_refused(options: tuple[int | None, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Encoding(*options)
