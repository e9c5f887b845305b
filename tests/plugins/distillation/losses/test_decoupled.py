"""Decoupled distillation against numpy, up to logits of 1e4, and its link to `kd_loss`."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compression_manager import ConfigError
from compression_plugins.distillation.losses import dkd_loss, kd_loss
from distillation_loss_reference import batch_mean, decoupled


@st.composite
def arguments(draw, size=1e4):
    shape = draw(
        hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=4).map(
            lambda sides: (*sides[:-1], sides[-1] + 2)
        )
    )
    elements = st.floats(-size, size)
    student, teacher = (draw(hnp.arrays(np.float64, shape, elements=elements)) for _ in "st")
    indices = st.integers(0, shape[-1] - 1)
    return student, teacher, draw(hnp.arrays(np.int64, shape[:-1], elements=indices))


@settings(max_examples=80, deadline=None)
@given(
    items=arguments(),
    temperature=st.floats(0.25, 20),
    alpha=st.floats(0, 10),
    beta=st.floats(0, 10),
)
def test_values_match_numpy(items, temperature, alpha, beta):
    student, teacher, target = items
    leaf = torch.tensor(student, requires_grad=True)
    value = dkd_loss(leaf, torch.tensor(teacher), torch.tensor(target), alpha, beta, temperature)
    expected = batch_mean(decoupled, student, teacher, temperature, target, alpha=alpha, beta=beta)
    largest = 1 + max(np.abs(student).max(), np.abs(teacher).max())
    tolerance = 1e-13 * largest * (1 + temperature) * (1 + alpha + beta) * student.shape[-1]
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=tolerance)
    value.backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_stay_finite_and_exact(dtype):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]).to(dtype).requires_grad_()
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 5e3]]).to(dtype)
    target = torch.tensor([0, 0])
    value = dkd_loss(student, teacher, target)
    value.backward()
    exact = (student.detach().double().numpy(), teacher.double().numpy(), 1.0, target.numpy())
    assert value.item() == pytest.approx(batch_mean(decoupled, *exact, alpha=1, beta=8), rel=1e-6)
    assert student.grad.isfinite().all()


def test_the_target_has_no_influence_on_the_others_however_large_it_is():
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    target = torch.tensor([0, 1, 5, 3])
    expected = dkd_loss(student, teacher, target, alpha=0, beta=1)
    for item, shift in ((student, 2000.0), (teacher, -500.0)):
        item[torch.arange(4), target] += shift
    torch.testing.assert_close(dkd_loss(student, teacher, target, alpha=0, beta=1), expected)


def test_with_the_teachers_own_weights_it_is_the_undivided_loss():
    student, teacher = torch.randn(2, 1, 6, dtype=torch.float64)
    target = torch.tensor([2])
    beta = 1 - (teacher / 3).softmax(-1)[0, 2].item()
    torch.testing.assert_close(
        dkd_loss(student, teacher, target, 1.0, beta, 3.0), kd_loss(student, teacher, 3.0)
    )


def test_defaults_are_one_eight_and_one():
    student, teacher = torch.randn(2, 4, 6)
    target = torch.tensor([0, 1, 5, 3])
    given_all = dkd_loss(student, teacher, target, alpha=1, beta=8, temperature=1)
    assert torch.equal(dkd_loss(student, teacher, target), given_all)


def test_two_classes_have_only_the_first_part_and_warn():
    student, teacher = torch.randn(2, 4, 2, dtype=torch.float64)
    target = torch.tensor([0, 1, 1, 0])
    with pytest.warns(UserWarning, match="two classes.*NCKD is 0"):
        value = dkd_loss(student, teacher, target, 1.0, 8.0, 2.0)
    torch.testing.assert_close(value, kd_loss(student, teacher, 2.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_any_integer_dtype_can_index(dtype):
    student, teacher = torch.randn(2, 2, 3)
    target = torch.tensor([0, 2])
    assert torch.equal(
        dkd_loss(student, teacher, target.to(dtype)), dkd_loss(student, teacher, target)
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([0, 3], "indices from 0 to 3; valid are 0 to 2"),
        ([-100, 1], "indices from -100 to 1"),
        ([0, 1, 2], r"target has shape \(3,\)"),
        ([0.0, 1.0], "target is torch.float32; it must hold integer"),
        ([True, False], "target is torch.bool; it must hold integer"),
    ],
)
def test_a_target_that_is_no_class_is_refused(target, message):
    with pytest.raises(ConfigError, match=message):
        dkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor(target))


def test_a_single_class_is_refused():
    with pytest.raises(ConfigError, match="two classes at least"):
        dkd_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
