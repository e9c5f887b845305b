"""Reverse KL, Jensen-Shannon and DIST against numpy, and where they tend to."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compression_manager import ConfigError
from compression_plugins.distillation.losses import (
    dist_loss,
    jensen_shannon_loss,
    kd_loss,
    reverse_kl_loss,
    token_jensen_shannon_loss,
)
from distillation_loss_reference import batch_mean, dist, jensen_shannon, reverse_kl


@st.composite
def logits(draw, size=1e4):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=5))
    elements = st.floats(-size, size)
    return tuple(draw(hnp.arrays(np.float64, shape, elements=elements)) for _ in "st")


def tolerance(pair, temperature):
    largest = 1 + max(np.abs(pair[0]).max(), np.abs(pair[1]).max()) / temperature
    return 1e-13 * largest * temperature**2 * pair[0].shape[-1]


@settings(max_examples=80, deadline=None)
@given(pair=logits(), temperature=st.floats(0.25, 20))
def test_reverse_kl_matches_numpy(pair, temperature):
    value = reverse_kl_loss(*map(torch.tensor, pair), temperature)
    expected = batch_mean(reverse_kl, *pair, temperature)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=tolerance(pair, temperature))


@settings(max_examples=80, deadline=None)
@given(pair=logits(), temperature=st.floats(0.25, 20), beta=st.floats(0.001, 0.999))
def test_jensen_shannon_matches_numpy(pair, temperature, beta):
    leaf = torch.tensor(pair[0], requires_grad=True)
    value = jensen_shannon_loss(leaf, torch.tensor(pair[1]), beta, temperature)
    expected = batch_mean(jensen_shannon, *pair, temperature, beta=beta)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=tolerance(pair, temperature))
    value.backward()
    assert leaf.grad.isfinite().all()


def test_reverse_is_forward_with_the_roles_changed():
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(reverse_kl_loss(student, teacher, 2), kd_loss(teacher, student, 2))


def test_jensen_shannon_is_symmetric_and_bounded_by_the_entropy_of_beta():
    student, teacher = 100 * torch.randn(2, 40, 5, dtype=torch.float64)
    left, right = (
        jensen_shannon_loss(student, teacher, 0.3),
        jensen_shannon_loss(teacher, student, 0.7),
    )
    torch.testing.assert_close(left, right)
    assert left <= -(0.3 * np.log(0.3) + 0.7 * np.log(0.7))


def test_jensen_shannon_tends_to_both_divergences():
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    small = 1e-6
    forward = jensen_shannon_loss(student, teacher, small) / small
    reverse = jensen_shannon_loss(student, teacher, 1 - small) / small
    torch.testing.assert_close(forward, kd_loss(student, teacher), rtol=1e-4, atol=0)
    torch.testing.assert_close(reverse, reverse_kl_loss(student, teacher), rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_of_nothing_is_refused(beta):
    for loss in (jensen_shannon_loss, token_jensen_shannon_loss):
        with pytest.raises(ConfigError, match="beta must be above 0 and below 1"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3), beta=beta)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_dist_matches_numpy(shape, temperature):
    student, teacher = np.random.default_rng(0).normal(size=(2, *shape))
    value = dist_loss(torch.tensor(student), torch.tensor(teacher), 2.0, 0.5, temperature)
    expected = dist(student, teacher, 2.0, 0.5, temperature)
    assert value.item() == pytest.approx(expected, rel=1e-10)


@settings(max_examples=80, deadline=None)
@given(pair=logits(), temperature=st.floats(0.25, 20))
def test_dist_stays_within_its_bounds(pair, temperature):
    leaf = torch.tensor(pair[0], requires_grad=True)
    value = dist_loss(leaf, torch.tensor(pair[1]), temperature=temperature)
    value.backward()
    assert -1e-9 <= value.item() <= 4 * temperature**2 + 1e-9
    assert leaf.grad.isfinite().all()


def test_dist_of_rows_and_columns_that_are_constant_up_to_rounding_is_uncorrelated():
    # In float32 the mean of ten times 1/10, and of eleven equal probabilities, is rounded.
    uniform, same = torch.zeros(4, 10), torch.randn(1, 6).repeat(11, 1)
    for student, weights in ((uniform, (1, 1)), (same, (0, 1))):
        student.requires_grad_()
        value = dist_loss(student, torch.randn(student.shape), *weights)
        value.backward()
        assert value.item() == sum(weights)
        assert student.grad.count_nonzero() == 0


def test_dist_weighs_both_relations_and_defaults_to_one():
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    inter, intra = (dist_loss(student, teacher, *weights) for weights in ((1, 0), (0, 1)))
    torch.testing.assert_close(dist_loss(student, teacher), inter + intra)
    torch.testing.assert_close(dist_loss(student, teacher, 2, 3), 2 * inter + 3 * intra)
