"""Losses on features, relations and embeddings against numpy, and what leaves them unchanged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import distillation_loss_reference as reference
from compression_manager import ConfigError
from compression_plugins.distillation.losses import (
    attention_transfer_loss,
    contrastive_loss,
    hint_loss,
    l1_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)

RELATIONS = {
    rkd_distance_loss: reference.rkd_distance,
    rkd_angle_loss: reference.rkd_angle,
    similarity_preserving_loss: reference.similarity_preserving,
}
# Multiples of 1/8: differences are exact, so that samples are equal or clearly apart.
ELEMENTS = st.integers(-80, 80).map(lambda value: value / 8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@st.composite
def embeddings(draw, same_width=False):
    samples, *widths = (draw(st.integers(1, 5)) for _ in range(3))
    if same_width:
        widths[1] = widths[0]
    return tuple(
        draw(hnp.arrays(np.float64, (samples, width), elements=ELEMENTS)) for width in widths
    )


@st.composite
def maps(draw):
    samples, *channels = (draw(st.integers(1, 3)) for _ in range(3))
    places = draw(hnp.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=3))
    return tuple(
        draw(hnp.arrays(np.float64, (samples, size, *places), elements=ELEMENTS))
        for size in channels
    )


def check(value, leaf, expected):
    assert value.item() == pytest.approx(expected, rel=1e-10, abs=1e-13)
    value.backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("loss", RELATIONS)
@settings(max_examples=80, deadline=None)
@given(pair=embeddings())
def test_relations_match_numpy(loss, pair):
    leaf = torch.tensor(pair[0], requires_grad=True)
    check(loss(leaf, torch.tensor(pair[1])), leaf, RELATIONS[loss](*pair))


@settings(max_examples=80, deadline=None)
@given(pair=embeddings(same_width=True), temperature=st.floats(0.05, 10))
def test_contrast_matches_numpy(pair, temperature):
    leaf = torch.tensor(pair[0], requires_grad=True)
    value = contrastive_loss(leaf, torch.tensor(pair[1]), temperature)
    check(value, leaf, reference.contrastive(*pair, temperature))


@settings(max_examples=80, deadline=None)
@given(pair=maps())
def test_attention_transfer_matches_numpy(pair):
    leaf = torch.tensor(pair[0], requires_grad=True)
    value = attention_transfer_loss(leaf, torch.tensor(pair[1]))
    check(value, leaf, reference.attention_transfer(*pair))


@settings(max_examples=40, deadline=None)
@given(pair=embeddings(same_width=True))
def test_hint_and_l1_match_numpy(pair):
    student, teacher = map(torch.tensor, pair)
    assert hint_loss(student, teacher).item() == pytest.approx(np.mean((pair[0] - pair[1]) ** 2))
    assert l1_loss(student, teacher).item() == pytest.approx(np.mean(np.abs(pair[0] - pair[1])))


def test_hand_computed_distances():
    # Distances 1, 2, 3 (mean 2) against 1, 1, 2 (mean 4/3): differences 1/4, 1/4, 0 per pair.
    student, teacher = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    expected = 2 * (0.25**2 / 2 + 0.25**2 / 2) / 9
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_rotating_moving_and_scaling_an_embedding_changes_nothing(loss):
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    moved = 7.5 * student @ rotation + torch.randn(4)
    torch.testing.assert_close(loss(moved, teacher), loss(student, teacher))
    torch.testing.assert_close(loss(moved, student), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("loss", [similarity_preserving_loss, contrastive_loss])
def test_rotating_and_scaling_both_changes_nothing(loss):
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    turned = loss(3 * student @ rotation, 0.5 * teacher @ rotation)
    torch.testing.assert_close(turned, loss(student, teacher))


SCALE_FREE = [*RELATIONS, contrastive_loss, attention_transfer_loss]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("loss", SCALE_FREE)
def test_no_scale_is_too_small_or_too_large_for_float32(loss, scale):
    student, teacher = torch.randn(2, 4, 3, 2)
    leaf, scaled = student.requires_grad_(), (scale * student.detach()).requires_grad_()
    expected, value = loss(leaf, teacher), loss(scaled, scale * teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, scaled)[0] * scale, torch.autograd.grad(expected, leaf)[0]
    )


def test_the_teachers_channels_may_differ():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 7, 4, 4)
    assert attention_transfer_loss(student, teacher) > 0
    assert similarity_preserving_loss(student, teacher) > 0


def test_close_samples_far_from_the_origin_keep_their_distances():
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    value = rkd_distance_loss(teacher / 64 + 1000, teacher)
    assert value.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_far_from_the_origin_float32_is_as_exact_as_float64(loss):
    student, teacher = 0.01 * torch.randn(6, 4) + 1000, torch.randn(6, 4)
    exact = loss(student.double(), teacher.double())
    torch.testing.assert_close(loss(student, teacher).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", RELATIONS)
def test_one_of_many_equal_samples_has_a_finite_gradient(loss):
    student, teacher = torch.randn(2, 5, 3)
    student[1] = student[0]
    student[2] = 0
    student.requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.isfinite().all()
    assert student.grad[3].abs().sum() > 0


def test_a_map_of_zeros_gets_no_gradient_and_leaves_the_others_theirs():
    student, teacher = torch.randn(2, 3, 4, 2, 2)
    student[1] = 0
    student.requires_grad_()
    attention_transfer_loss(student, teacher).backward()
    assert student.grad[1].count_nonzero() == 0
    assert student.grad[0].abs().sum() > 0


def test_contrast_is_the_logarithm_of_the_batch_where_nothing_is_told_apart():
    same = torch.ones(7, 3)
    assert contrastive_loss(same, same).item() == pytest.approx(np.log(7))


def test_contrast_prefers_the_own_teacher():
    teacher = torch.eye(4)
    own, others = (contrastive_loss(item, teacher, 0.1) for item in (teacher, teacher.roll(1, 0)))
    assert own.item() == pytest.approx(np.log1p(3 * np.exp(-10)), rel=1e-2)
    assert others.item() == pytest.approx(10 + np.log1p(3 * np.exp(-10)), rel=1e-3)


def test_contrast_defaults_to_temperature_one():
    student, teacher = torch.randn(2, 4, 3)
    assert torch.equal(contrastive_loss(student, teacher), contrastive_loss(student, teacher, 1.0))


@pytest.mark.parametrize("loss", [hint_loss, l1_loss, contrastive_loss])
def test_other_widths_are_refused(loss):
    with pytest.raises(ConfigError, match=r"\(2, 3\).*\(2, 4\).*projection"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3, 4), (2, 3, 5)), ((2, 3), (2, 3, 1))])
def test_attention_needs_equal_places(shapes):
    with pytest.raises(ConfigError, match="attention transfer needs"):
        attention_transfer_loss(*map(torch.zeros, shapes))


@pytest.mark.parametrize("loss", SCALE_FREE)
def test_features_need_a_dimension_after_the_samples(loss):
    with pytest.raises(ConfigError, match=r"student features have shape \(3,\)"):
        loss(torch.zeros(3), torch.zeros(3, 1))
