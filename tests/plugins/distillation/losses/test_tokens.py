"""Token losses: the mask, padding, micro-batches, and slices of the vocabulary."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import distillation_loss_reference as reference
from compression_manager import ConfigError
from compression_plugins.distillation.losses import (
    jensen_shannon_loss,
    kd_loss,
    reverse_kl_loss,
    token_jensen_shannon_loss,
    token_kl_loss,
    token_reverse_kl_loss,
)

LOSSES = {
    token_kl_loss: reference.kl,
    token_reverse_kl_loss: reference.reverse_kl,
    token_jensen_shannon_loss: reference.jensen_shannon,
}
LOGIT_LOSSES = {
    token_kl_loss: kd_loss,
    token_reverse_kl_loss: reverse_kl_loss,
    token_jensen_shannon_loss: jensen_shannon_loss,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@st.composite
def sequences(draw, size=50.0):
    """Draw student, teacher, mask with at least one token, and temperatures."""
    shape = tuple(draw(st.integers(1, 5)) for _ in range(3))
    elements = st.floats(-size, size)
    student, teacher = (draw(hnp.arrays(np.float64, shape, elements=elements)) for _ in "st")
    mask = draw(hnp.arrays(np.bool_, shape[:-1]))
    mask[0, 0] = True
    temperature = draw(hnp.arrays(np.float64, shape[:-1], elements=st.floats(0.25, 20)))
    return student, teacher, mask, temperature


def evaluate(loss, student, *more, **options):
    """Return the loss and its gradient."""
    leaf = torch.as_tensor(student).clone().requires_grad_()
    value = loss(leaf, *map(torch.as_tensor, more), **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=40, deadline=None)
@given(items=sequences())
def test_is_the_mean_over_counted_tokens(loss, chunk_size, items):
    student, teacher, mask, temperature = items
    value, gradient = evaluate(loss, *items, chunk_size=chunk_size)
    counted = [item[mask] for item in (student, teacher)]
    expected = reference.batch_mean(LOSSES[loss], *counted, temperature[mask])
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert gradient[~torch.tensor(mask)].count_nonzero() == 0


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=60, deadline=None)
@given(items=sequences(), chunk_size=st.integers(1, 7))
def test_slices_of_the_vocabulary_change_neither_value_nor_gradient(loss, items, chunk_size):
    whole = evaluate(loss, *items)
    assert_same(evaluate(loss, *items, chunk_size=chunk_size), whole)


@pytest.mark.parametrize("chunk_size", [None, 2])
@settings(max_examples=30, deadline=None)
@given(items=sequences(), beta=st.floats(0.01, 0.99))
def test_beta_is_the_teachers_share(chunk_size, items, beta):
    student, teacher, mask, temperature = items
    value, _ = evaluate(token_jensen_shannon_loss, *items, beta=beta, chunk_size=chunk_size)
    counted = [item[mask] for item in (student, teacher)]
    expected = reference.batch_mean(
        reference.jensen_shannon, *counted, temperature[mask], beta=beta
    )
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    items=sequences(),
    chunk_size=st.integers(1, 7),
    smoothing=st.floats(1e-6, 1),
    beta=st.floats(0.01, 0.99),
)
def test_slices_keep_smoothing_and_beta(items, chunk_size, smoothing, beta):
    for loss, option in (
        (token_kl_loss, {"label_smoothing": smoothing}),
        (token_jensen_shannon_loss, {"beta": beta}),
    ):
        whole = evaluate(loss, *items, **option)
        assert_same(evaluate(loss, *items, **option, chunk_size=chunk_size), whole)


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64])
@pytest.mark.parametrize("loss", LOSSES)
def test_slices_of_large_float32_logits_are_as_exact_as_all_at_once(loss, chunk_size):
    student, teacher = 1e4 * torch.randn(2, 20, 10)
    student[:10], teacher[:10] = student[:10] / 1e3 + 1e4, teacher[:10] / 1e3 - 1e4
    exact, exact_gradient = evaluate(loss, student.double(), teacher.double())
    value, gradient = evaluate(loss, student, teacher, chunk_size=chunk_size)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_of_slices(loss, temperature):
    student, teacher = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    student.requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert torch.autograd.gradcheck(
        lambda item: loss(item, teacher, mask, temperature, chunk_size=3), student
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])  # Division by 3 would round in bfloat16.
def test_slices_take_a_strided_student_in_half_precision(temperature):
    student, teacher = torch.randn(2, 9, 4, 3).bfloat16().permute(0, 2, 3, 1)
    options = {"mask": None, "temperature": temperature}
    value, gradient = evaluate(token_kl_loss, student, teacher, **options, chunk_size=4)
    expected, exact_gradient = evaluate(
        token_kl_loss, student.double(), teacher.double(), **options
    )
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2**-8, atol=1e-7)


def test_slices_cannot_be_differentiated_twice():
    student, teacher = torch.randn(2, 3, 7)
    student.requires_grad_()
    value = token_kl_loss(student, teacher, chunk_size=3)
    with pytest.raises(ConfigError, match="chunk_size cannot be differentiated twice"):
        torch.autograd.grad(value, student, create_graph=True)


def split(items, sizes):
    return zip(*(torch.split(torch.as_tensor(item), sizes) for item in items), strict=True)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=30, deadline=None)
@given(items=sequences(), data=st.data())
def test_micro_batches_add_up_to_the_whole(loss, chunk_size, items, data):
    rows = len(items[0])
    first = data.draw(st.integers(0, rows - 1))
    sizes = [size for size in (first, rows - first) if size]
    num_items = items[2].sum()
    number = data.draw(st.sampled_from([int(num_items), torch.tensor(num_items)]))
    parts = [
        evaluate(loss, *part, num_items=number, chunk_size=chunk_size)
        for part in split(items, sizes)
    ]
    summed = sum(value for value, _ in parts), torch.cat([gradient for _, gradient in parts])
    assert_same(summed, evaluate(loss, *items, chunk_size=chunk_size))


@pytest.mark.parametrize("loss", [kd_loss, reverse_kl_loss, jensen_shannon_loss])
@settings(max_examples=30, deadline=None)
@given(items=sequences(), data=st.data())
def test_logit_losses_of_micro_batches_average_to_the_whole(loss, items, data):
    student, teacher = (item.reshape(-1, item.shape[-1]) for item in items[:2])
    first = data.draw(st.integers(0, len(student) - 1))
    sizes = [size for size in (first, len(student) - first) if size]
    parts = [len(part[0]) / len(student) * loss(*part) for part in split((student, teacher), sizes)]
    torch.testing.assert_close(
        sum(parts), loss(*map(torch.tensor, (student, teacher))), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=30, deadline=None)
@given(
    items=sequences(),
    width=st.integers(1, 3),
    filling=st.sampled_from([0.0, -1e4, float("nan"), float("inf"), -float("inf")]),
)
def test_padding_of_anything_changes_nothing(loss, chunk_size, items, width, filling):
    def pad(item, value):
        extra = np.full((item.shape[0], width, *item.shape[2:]), value, item.dtype)
        return np.concatenate([item, extra], 1)

    padded = [pad(item, filling) for item in items]
    padded[2] = pad(items[2], False)
    value, gradient = evaluate(loss, *padded, chunk_size=chunk_size)
    real = items[2].shape[1]
    assert gradient[:, real:].count_nonzero() == 0
    expected = evaluate(loss, *items, chunk_size=chunk_size)
    assert_same((value, gradient[:, :real]), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_mask_it_is_the_logit_loss(loss):
    student, teacher = torch.randn(2, 2, 3, 5)
    torch.testing.assert_close(
        loss(student, teacher, None, 2.0), LOGIT_LOSSES[loss](student, teacher, temperature=2.0)
    )


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_counted_token_costs_nothing(loss, chunk_size):
    student, teacher = torch.randn(2, 2, 3, 5)
    value, gradient = evaluate(loss, student, teacher, torch.zeros(2, 3), chunk_size=chunk_size)
    assert value.item() == 0
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_any_dtype_can_mask(dtype):
    student, teacher = torch.randn(2, 2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(
        token_kl_loss(student, teacher, mask.to(dtype)), token_kl_loss(student, teacher, mask)
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(3)}, r"mask has shape \(3,\).*one value per token: \(2, 3\)"),
        ({"mask": torch.full((2, 3), -100)}, "mask holds -100; it must be 1"),
        ({"mask": torch.full((2, 3), 0.5)}, "mask holds 0.5; it must be 1"),
        ({"num_items": 0}, "num_items must be an integer above 0, got 0"),
        ({"num_items": 2.5}, "num_items must be an integer above 0, got 2.5"),
        ({"num_items": torch.ones(2)}, r"num_items has shape \(2,\)"),
        ({"chunk_size": 0}, "chunk_size must be an integer above 0, got 0"),
        ({"chunk_size": 1.5}, "chunk_size must be an integer above 0"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"temperature": 0.0, "chunk_size": 2}, "temperature must be a finite number above 0"),
        ({"mask": torch.ones(2, 3), "temperature": torch.ones(2)}, "temperature has shape"),
    ],
)
def test_wrong_options_are_refused(loss, options, message):
    with pytest.raises(ConfigError, match=message):
        loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_temperature_per_token_is_not_rounded_to_half_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, generator=generator).to(dtype) for _ in range(2))
    temperature = 1 + 3 * torch.rand(2, 5, generator=generator)
    wide = token_kl_loss(student.double(), teacher.double(), None, temperature.double())
    for chunk_size in (None, 3):
        loss = token_kl_loss(student, teacher, None, temperature, chunk_size=chunk_size)
        assert loss.item() == pytest.approx(wide.item(), rel=1e-5)
