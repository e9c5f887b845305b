"""What every distillation loss promises: dtypes, gradients, autocast, errors, finite results."""

import numpy as np
import pytest
import torch

from compression_manager import ConfigError
from compression_plugins.distillation import losses

TARGET = torch.tensor([[0, 4, 2], [1, 1, 3]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
LOGITS = {
    "kd_loss": lambda s, t: losses.kd_loss(s, t, 2.0, label_smoothing=0.1),
    "soft_cross_entropy": lambda s, t: losses.soft_cross_entropy(s, t, 2.0),
    "mse_loss": losses.mse_loss,
    "dkd_loss": lambda s, t: losses.dkd_loss(s, t, TARGET, temperature=2.0),
    "dist_loss": lambda s, t: losses.dist_loss(s, t, temperature=2.0),
    "reverse_kl_loss": lambda s, t: losses.reverse_kl_loss(s, t, 2.0),
    "jensen_shannon_loss": lambda s, t: losses.jensen_shannon_loss(s, t, 0.3, 2.0),
    "token_kl_loss": lambda s, t: losses.token_kl_loss(s, t, MASK, 2.0),
    "token_reverse_kl_loss": lambda s, t: losses.token_reverse_kl_loss(s, t, MASK, 2.0),
    "token_jensen_shannon_loss": lambda s, t: losses.token_jensen_shannon_loss(s, t, MASK, 2.0),
    "chunked": lambda s, t: losses.token_jensen_shannon_loss(s, t, MASK, 2.0, chunk_size=2),
}
FEATURES = {
    name: getattr(losses, name)
    for name in (
        "hint_loss",
        "l1_loss",
        "attention_transfer_loss",
        "rkd_distance_loss",
        "rkd_angle_loss",
        "similarity_preserving_loss",
        "contrastive_loss",
    )
}
EVERY = {
    **{name: (loss, (2, 3, 5)) for name, loss in LOGITS.items()},
    **{name: (loss, (4, 3, 2)) for name, loss in FEATURES.items()},
}


@pytest.fixture(params=EVERY)
def loss_and_shape(request):
    return EVERY[request.param]


def pair(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "st"]


def test_every_exported_loss_is_covered():
    assert set(losses.__all__) == set(EVERY) - {"chunked"}


def test_gradcheck(loss_and_shape):
    loss, shape = loss_and_shape
    student, teacher = pair(shape)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda item: loss(item, teacher), student)


def test_result_is_a_scalar_and_the_teacher_gets_no_gradient(loss_and_shape):
    loss, shape = loss_and_shape
    student, teacher = (item.requires_grad_() for item in pair(shape))
    value = loss(student, teacher)
    assert value.shape == ()
    value.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss_and_shape, dtype):
    loss, shape = loss_and_shape
    student, teacher = pair(shape, dtype)
    exact_student = student.double().requires_grad_()
    exact = loss(exact_student, teacher.double())
    exact.backward()
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert student.grad.dtype == dtype
    assert value.item() == pytest.approx(exact.item(), rel=2e-6, abs=1e-7)
    largest = exact_student.grad.abs().max().item()
    np.testing.assert_allclose(
        student.grad.double(), exact_student.grad, rtol=torch.finfo(dtype).eps, atol=2e-6 * largest
    )


def test_autocast_changes_nothing(loss_and_shape):
    loss, shape = loss_and_shape
    student, teacher = pair(shape, torch.float32)
    expected = loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


def test_a_teacher_of_another_dtype_raises_the_precision(loss_and_shape):
    loss, shape = loss_and_shape
    student, teacher = pair(shape, torch.float32)
    value = loss(student.bfloat16().requires_grad_(), teacher)
    expected = loss(student.bfloat16().float(), teacher)
    torch.testing.assert_close(value, expected)


# Smoothing, the teacher's entropy and the other samples cost something even then.
@pytest.mark.parametrize(
    "name", sorted(set(EVERY) - {"kd_loss", "soft_cross_entropy", "contrastive_loss"})
)
def test_twins_cost_nothing(name):
    loss, shape = EVERY[name]
    student = pair(shape, torch.float32)[0].requires_grad_()
    value = loss(student, student.detach().clone())
    value.backward()
    assert student.grad.isfinite().all()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-20, 1e4])
def test_equal_samples_have_a_finite_gradient(loss_and_shape, fill):
    loss, shape = loss_and_shape
    _, teacher = pair(shape, torch.float32)
    student = torch.full(shape, fill, requires_grad=True)
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_small_and_large_inputs_stay_finite(loss_and_shape, scale):
    loss, shape = loss_and_shape
    student, teacher = (scale * item for item in pair(shape, torch.float32))
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_values_and_gradients_repeat_exactly_and_inputs_are_untouched(loss_and_shape):
    loss, shape = loss_and_shape
    student, teacher = pair(shape, torch.float32)
    before = student.clone(), teacher.clone()
    results = []
    for _ in range(2):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher)
        value.backward()
        results.append((value, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("name", sorted(set(LOGITS) - {"mse_loss"}))
def test_adding_a_constant_to_all_logits_of_a_position_changes_nothing(name):
    student, teacher = pair((2, 3, 5))
    shift = torch.randn(2, 3, 1, dtype=torch.float64)
    expected = LOGITS[name](student, teacher)
    torch.testing.assert_close(LOGITS[name](student + shift, teacher - 3 * shift), expected)


@pytest.mark.parametrize("name", ["kd_loss", "dist_loss", "reverse_kl_loss", "jensen_shannon_loss"])
def test_order_of_classes_and_of_positions_does_not_matter(name):
    student, teacher = pair((6, 5))
    expected = LOGITS[name](student, teacher)
    order, classes = torch.randperm(6), torch.randperm(5)
    permuted = (item[order][:, classes] for item in (student, teacher))
    torch.testing.assert_close(LOGITS[name](*permuted), expected)


@pytest.mark.parametrize("name", FEATURES)
def test_order_of_samples_does_not_matter(name):
    student, teacher = pair((4, 3, 2))
    order = torch.tensor([2, 0, 3, 1])
    expected = FEATURES[name](student, teacher)
    torch.testing.assert_close(FEATURES[name](student[order], teacher[order]), expected)


@pytest.mark.parametrize("name", [*LOGITS, *FEATURES])
def test_integers_and_empty_tensors_are_refused(name):
    loss, shape = EVERY[name]
    with pytest.raises(ConfigError, match=r"student .* torch\.int64; they must be floating-point"):
        loss(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))
    with pytest.raises(ConfigError, match=r"teacher .* empty"):
        loss(torch.zeros(shape), torch.zeros((0, *shape[1:])))


@pytest.mark.parametrize("name", [*LOGITS, *FEATURES])
def test_other_numbers_of_samples_are_refused(name):
    loss, shape = EVERY[name]
    with pytest.raises(ConfigError, match=r"student .*teacher .*"):
        loss(torch.zeros(shape), torch.zeros((shape[0] + 1, *shape[1:])))


@pytest.mark.parametrize("name", ["kd_loss", "soft_cross_entropy", "reverse_kl_loss", "mse_loss"])
def test_a_scalar_is_no_logits(name):
    with pytest.raises(ConfigError, match=r"must be \(\*, classes\), got a scalar"):
        LOGITS[name](torch.tensor(1.0), torch.tensor(1.0))
