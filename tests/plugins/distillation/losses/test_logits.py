"""Each loss against float64 numpy, over temperatures, shapes and dtypes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compression_manager import ConfigError
from compression_plugins.distillation.losses import kd_loss, mse_loss, soft_cross_entropy

LOSSES = [kd_loss, soft_cross_entropy, mse_loss]
TEMPERATURES = st.floats(0.1, 100)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference(loss, student, teacher, temperature):
    student, teacher = student / temperature, teacher / temperature
    if loss is mse_loss:
        return temperature**2 * np.mean((student - teacher) ** 2)
    log_student, log_teacher = log_softmax(student), log_softmax(teacher)
    target = np.exp(log_teacher)
    per_position = -(target * log_student).sum(-1)
    if loss is kd_loss:
        per_position = per_position + (target * log_teacher).sum(-1)
    return temperature**2 * per_position.mean()


@st.composite
def logits(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=5))
    elements = st.floats(-1e4, 1e4)
    student, teacher = (draw(hnp.arrays(np.float64, shape, elements=elements)) for _ in range(2))
    return student, teacher


def size(student, teacher, temperature):
    """The magnitude of the numbers that are subtracted from each other on the way."""
    largest = max(np.abs(student).max(), np.abs(teacher).max()) / temperature
    return (1 + largest) * temperature**2


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=60, deadline=None)
@given(pair=logits(), temperature=TEMPERATURES)
def test_values_and_gradients_match_numpy(loss, pair, temperature):
    student = torch.tensor(pair[0], requires_grad=True)
    teacher = torch.tensor(pair[1], requires_grad=True)
    value = loss(student, teacher, temperature)
    assert value.shape == ()
    expected = reference(loss, *pair, temperature)
    tolerance = 1e-13 * size(*pair, temperature) * pair[0].shape[-1]
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=tolerance)
    assert value.item() >= -tolerance
    value.backward()
    assert teacher.grad is None
    if loss is mse_loss:
        gradient = 2 * (pair[0] - pair[1]) / pair[0].size
    else:
        difference = np.exp(log_softmax(pair[0] / temperature)) - np.exp(
            log_softmax(pair[1] / temperature)
        )
        gradient = temperature * difference / pair[0][..., 0].size
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=40, deadline=None)
@given(pair=logits(), temperature=TEMPERATURES)
def test_half_precision_is_as_exact_as_float32(loss, pair, temperature):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        student, teacher = (torch.tensor(item).to(dtype) for item in pair)
        exact = [item.double().numpy() for item in (student, teacher)]
        student.requires_grad_()
        value = loss(student, teacher, temperature)
        assert value.dtype == torch.float32
        tolerance = 1e-6 * size(*exact, temperature) * pair[0].shape[-1]
        assert value.item() == pytest.approx(
            reference(loss, *exact, temperature), rel=1e-5, abs=tolerance
        )
        value.backward()
        assert student.grad.dtype == dtype
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, temperature, shape):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda item: loss(item, teacher, temperature), student)


@pytest.mark.parametrize("loss", LOSSES)
def test_is_a_mean_over_all_positions(loss):
    student, teacher = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    whole = loss(student, teacher, 2.0)
    each = [
        loss(one, other, 2.0)
        for one, other in zip(student.view(-1, 1, 5), teacher.view(-1, 1, 5), strict=True)
    ]
    torch.testing.assert_close(whole, torch.stack(each).mean())


@pytest.mark.parametrize("loss", LOSSES)
def test_factor_is_the_square_of_the_temperature(loss):
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(loss(student, teacher, 3.0), 9 * loss(student / 3, teacher / 3, 1.0))


def test_gradients_keep_their_size_at_high_temperature():
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    student.requires_grad_()
    norms = []
    for temperature in (100.0, 1000.0):
        (gradient,) = torch.autograd.grad(kd_loss(student, teacher, temperature), student)
        norms.append(gradient.norm())
    # Hinton et al. 2015, equation 4: (student - teacher) / classes once both have zero mean.
    centred = (student - student.mean(-1, keepdim=True)) - (
        teacher - teacher.mean(-1, keepdim=True)
    )
    expected = (centred / (5 * 4)).norm().detach()
    torch.testing.assert_close(norms, [expected, expected], rtol=0.02, atol=0)


def test_cross_entropy_is_divergence_plus_the_teachers_entropy():
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=teacher / 2).entropy().mean() * 4
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher, 2.0), kd_loss(student, teacher, 2.0) + entropy
    )
    assert kd_loss(teacher, teacher, 2.0).item() == 0.0


def test_temperature_defaults_to_one():
    student, teacher = torch.randn(2, 4, 5)
    for loss in LOSSES:
        assert torch.equal(loss(student, teacher), loss(student, teacher, 1.0))


@pytest.mark.parametrize("loss", LOSSES)
def test_other_shapes_are_refused(loss):
    with pytest.raises(ConfigError, match=r"\(2, 3\).*\(1, 3\)"):
        loss(torch.zeros(2, 3), torch.zeros(1, 3), 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", LOSSES)
def test_temperature_must_be_a_finite_number_above_zero(loss, temperature):
    with pytest.raises(ConfigError, match="temperature must be a finite number above 0"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature)
