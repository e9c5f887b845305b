"""One temperature per position, and label smoothing, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compression_manager import ConfigError
from compression_plugins.distillation import losses
from distillation_loss_reference import (
    batch_mean,
    cross_entropy,
    decoupled,
    jensen_shannon,
    kl,
    reverse_kl,
)

LOSSES = {
    losses.kd_loss: kl,
    losses.soft_cross_entropy: cross_entropy,
    losses.reverse_kl_loss: reverse_kl,
    losses.jensen_shannon_loss: jensen_shannon,
    losses.token_kl_loss: kl,
    losses.token_reverse_kl_loss: reverse_kl,
    losses.token_jensen_shannon_loss: jensen_shannon,
}
SMOOTHED = [losses.kd_loss, losses.soft_cross_entropy, losses.token_kl_loss]


@st.composite
def arguments(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=4))
    elements = st.floats(-50, 50)
    student, teacher = (draw(hnp.arrays(np.float64, shape, elements=elements)) for _ in "st")
    temperature = draw(hnp.arrays(np.float64, shape[:-1], elements=st.floats(0.25, 20)))
    return student, teacher, temperature


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=30, deadline=None)
@given(items=arguments())
def test_one_temperature_per_position_matches_numpy(loss, items):
    value = loss(*map(torch.tensor, items[:2]), temperature=torch.tensor(items[2]))
    expected = batch_mean(LOSSES[loss], *items)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


@settings(max_examples=30, deadline=None)
@given(items=arguments(), data=st.data())
def test_one_temperature_per_position_matches_numpy_for_dkd(items, data):
    student, teacher, temperature = items
    student, teacher = (np.concatenate([item, -item, item + 1], -1) for item in (student, teacher))
    indices = st.integers(0, student.shape[-1] - 1)
    target = data.draw(hnp.arrays(np.int64, temperature.shape, elements=indices))
    value = losses.dkd_loss(
        *map(torch.tensor, (student, teacher, target)), 0.5, 3.0, torch.tensor(temperature)
    )
    expected = batch_mean(decoupled, student, teacher, temperature, target, alpha=0.5, beta=3.0)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_temperatures_are_one_temperature(loss):
    student, teacher = torch.randn(2, 3, 4, 5)
    temperature = torch.full((3, 4), 2.5)
    torch.testing.assert_close(
        loss(student, teacher, temperature=temperature), loss(student, teacher, temperature=2.5)
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_temperature_gets_no_gradient(loss):
    student, teacher = torch.randn(2, 3, 5)
    student.requires_grad_()
    temperature = torch.full((3,), 2.0, requires_grad=True)
    loss(student, teacher, temperature=temperature).backward()
    assert temperature.grad is None


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (5,)])
@pytest.mark.parametrize("loss", [*LOSSES, losses.mse_loss])
def test_temperatures_of_another_shape_are_refused(loss, shape):
    with pytest.raises(ConfigError, match=r"temperature has shape .* one value per position: \(3,"):
        loss(torch.zeros(3, 5), torch.zeros(3, 5), temperature=torch.ones(shape))


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [*LOSSES, losses.mse_loss])
def test_each_temperature_must_be_a_finite_number_above_zero(loss, wrong):
    with pytest.raises(ConfigError, match=f"finite number above 0, got {wrong}"):
        loss(torch.zeros(2, 5), torch.zeros(2, 5), temperature=torch.tensor([1.0, wrong]))


def test_losses_of_relations_take_one_number_only():
    for loss in (losses.dist_loss, losses.contrastive_loss):
        with pytest.raises(ConfigError, match="it must be one number for all"):
            loss(torch.ones(2, 5), torch.ones(2, 5), temperature=torch.ones(2))


@pytest.mark.parametrize("loss", SMOOTHED)
@settings(max_examples=30, deadline=None)
@given(items=arguments(), smoothing=st.floats(1e-6, 1))
def test_label_smoothing_matches_numpy(loss, items, smoothing):
    student, teacher, temperature = items
    value = loss(
        *map(torch.tensor, (student, teacher)),
        temperature=torch.tensor(temperature),
        label_smoothing=smoothing,
    )
    expected = batch_mean(LOSSES[loss], student, teacher, temperature, smoothing=smoothing)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_label_smoothing_is_torchs_for_hard_labels():
    student = torch.randn(4, 5, dtype=torch.float64)
    labels = torch.tensor([0, 3, 4, 1])
    teacher = torch.nn.functional.one_hot(labels, 5) * 1000.0
    torch.testing.assert_close(
        losses.soft_cross_entropy(student, teacher.double(), label_smoothing=0.2),
        torch.nn.functional.cross_entropy(student, labels, label_smoothing=0.2),
    )


@pytest.mark.parametrize("loss", SMOOTHED)
def test_all_smoothed_away_every_teacher_is_the_uniform_one(loss):
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    value = loss(student, teacher, label_smoothing=1)
    torch.testing.assert_close(value, loss(student, torch.zeros_like(teacher)))


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("loss", SMOOTHED)
def test_label_smoothing_must_be_a_share(loss, wrong):
    with pytest.raises(ConfigError, match="label_smoothing must be from 0 to 1, got"):
        loss(torch.zeros(2, 5), torch.zeros(2, 5), label_smoothing=wrong)
