"""The loss that comes out of a manager with a distillation plugin."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import toys
from compression_manager import (
    LossError,
    prepare_compression,
)
from compression_plugins import DistillationConfig
from toy_teachers import begin, criterion, published


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def numpy_distance(loss, student, teacher):
    def log_softmax(x):
        return (
            x
            - x.max(-1, keepdims=True)
            - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        )

    target = np.exp(log_softmax(teacher))
    if loss == "MSE":
        return ((student - teacher) ** 2).mean()
    if loss == "CE":
        return -(target * log_softmax(student)).sum(-1).mean()
    return (target * (log_softmax(teacher) - log_softmax(student))).sum(-1).mean()


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.1, 0.9), (0.0, 1.0), (1.0, 0.0), (3, 2)])
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
@pytest.mark.parametrize("loss", ["CE", "KL", "MSE"])
def test_loss_is_the_documented_sum(loss, temperature, weights, example):
    inputs, targets = toys.vectors(8).tensors
    teacher, model = toys.mlp(16), toys.mlp()
    logits = [item(inputs).detach().double().numpy() / temperature for item in (model, teacher)]
    config = DistillationConfig(teacher, criterion(loss, temperature, weights))
    manager = begin(
        prepare_compression(model, [config], example_inputs=inputs[:2] if example else None)
    )
    output = model(inputs)
    task = F.cross_entropy(output, targets)
    result = manager.on_after_compute_loss(inputs, output, task)
    distance = temperature**2 * numpy_distance(loss, *logits)
    expected = weights[0] * task.item() + weights[1] * distance
    assert result.shape == ()
    assert result.item() == pytest.approx(expected, rel=1e-4)
    metrics = published(manager)
    assert metrics["loss/task"] == pytest.approx(task.item())
    assert metrics[f"loss/distillation/{loss}"] == pytest.approx(distance, rel=1e-4)
    assert metrics["loss/total"] == pytest.approx(expected, rel=1e-4)


def test_default_criterion_is_half_of_each_cross_entropy():
    inputs, targets = toys.vectors(8).tensors
    teacher, model = toys.mlp(16), toys.mlp()
    manager = begin(prepare_compression(model, [DistillationConfig(teacher)]))
    output = model(inputs)
    task = F.cross_entropy(output, targets)
    with torch.no_grad():
        soft = F.cross_entropy(output, teacher(inputs).softmax(-1))
    expected = 0.5 * task + 0.5 * soft
    torch.testing.assert_close(manager.on_after_compute_loss(inputs, output, task), expected)


def test_divergence_is_a_batch_mean():
    inputs, targets = toys.vectors(8).tensors
    teacher, model = toys.mlp(16), toys.mlp()
    config = DistillationConfig(teacher, criterion("KL", 1.0, (0, 1)))
    manager = begin(prepare_compression(model, [config]))
    output = model(inputs)
    with torch.no_grad():
        log_teacher = teacher(inputs).log_softmax(-1)
    expected = F.kl_div(output.log_softmax(-1), log_teacher, reduction="batchmean", log_target=True)
    result = manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
    torch.testing.assert_close(result, expected)


def test_without_weight_the_gradients_are_the_plain_ones():
    inputs, targets = toys.vectors(8).tensors
    model = toys.mlp()
    plain = torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))
    config = DistillationConfig(toys.mlp(16), criterion("KL", 4.0, (1, 0)))
    manager = begin(prepare_compression(model, [config]))
    output = model(inputs)
    manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets)).backward()
    for gradient, parameter in zip(plain, model.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


@pytest.mark.parametrize("loss", ["CE", "KL", "MSE"])
def test_student_learns_from_the_teacher_alone(loss):
    torch.manual_seed(0)
    data = toys.vectors(64)
    teacher, model = toys.mlp(16), toys.mlp(16)
    with torch.no_grad():
        teacher[2].weight.mul_(4)

    def divergence():
        with torch.no_grad():
            pair = [item(data.tensors[0]).log_softmax(-1) for item in (model, teacher)]
        return F.kl_div(*pair, reduction="batchmean", log_target=True).item()

    before = divergence()
    config = DistillationConfig(teacher, criterion(loss, 2.0, (0, 1)))
    manager = prepare_compression(model, [config])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    toys.train(manager, toys.loader(data), optimizer, 12)
    assert divergence() < 0.2 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype):
    inputs, targets = toys.vectors(8).tensors
    teacher, model = toys.mlp(16), toys.mlp()
    manager = begin(
        prepare_compression(model, [DistillationConfig(teacher, criterion("KL", 4.0, (0, 1)))])
    )
    output = model(inputs).to(dtype)
    with torch.no_grad():
        log_teacher = (teacher(inputs) / 4).log_softmax(-1)
    expected = F.kl_div(
        (output.float() / 4).log_softmax(-1), log_teacher, reduction="batchmean", log_target=True
    )
    result = manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
    assert result.item() == pytest.approx(16 * expected.item(), rel=1e-4)
    result.backward()
    assert model[0].weight.grad.isfinite().all()


def test_non_finite_logits_are_named():
    inputs, targets = toys.vectors(8).tensors
    teacher, model = toys.mlp(16), toys.mlp()
    with torch.no_grad():
        teacher[2].bias.fill_(float("nan"))
    manager = begin(prepare_compression(model, [DistillationConfig(teacher)]))
    output = model(inputs)
    with pytest.raises(LossError, match=r"distillation/CE = \S*( \* )?nan"):
        manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
