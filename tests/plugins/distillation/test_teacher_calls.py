"""How the teacher is called, and where its outputs come from."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import (
    ConfigError,
    prepare_compression,
)
from compression_plugins import DistillationConfig
from toy_teachers import CountingTeacher, begin, criterion, first_loss, published

VECTORS = toys.vectors(4).tensors[0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# How the teacher is called ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "args", "kwargs"),
    [
        (VECTORS, [VECTORS], {}),
        ((VECTORS, 1), [VECTORS, 1], {}),
        ((VECTORS,), [VECTORS], {}),
        ({"x": VECTORS, "mask": None}, [], {"x": VECTORS, "mask": None}),
        ({"x": VECTORS, "labels": 1, "label": 2}, [], {"x": VECTORS}),
    ],
)
def test_teacher_is_called_as_the_student_without_labels(inputs, args, kwargs):
    teacher = CountingTeacher(toys.mlp())
    manager = prepare_compression(toys.mlp(), [DistillationConfig(teacher)])
    given = dict(inputs) if isinstance(inputs, dict) else inputs
    first_loss(manager, given)
    ((seen_args, seen_kwargs),) = teacher.calls
    assert [id(item) for item in seen_args] == [id(item) for item in args]
    assert {name: id(item) for name, item in seen_kwargs.items()} == {
        name: id(item) for name, item in kwargs.items()
    }
    if isinstance(inputs, dict):
        assert given == inputs


def test_a_list_is_one_argument():
    teacher = CountingTeacher(nn.Identity(), wrap=lambda inputs: toys.mlp()(inputs[0]))
    manager = prepare_compression(toys.mlp(), [DistillationConfig(teacher)])
    first_loss(manager, [VECTORS, VECTORS])
    assert teacher.calls[0][0][0][0] is VECTORS


def test_own_forward_replaces_the_call():
    teacher = toys.mlp()
    seen = []

    def forward(model, inputs):
        seen.append((model, inputs, torch.is_grad_enabled()))
        return model(inputs["nested"]["x"])

    inputs = {"nested": {"x": VECTORS}, "labels": 3}
    first_loss(
        prepare_compression(toys.mlp(), [DistillationConfig(teacher, teacher_forward=forward)]),
        inputs,
    )
    ((model, given, gradient),) = seen
    assert model is teacher
    assert given is inputs
    assert not gradient


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda logits: {"loss": 0, "logits": logits}, {}),
        (lambda logits: SimpleNamespace(logits=logits), {}),
        (lambda logits: (logits, None), {}),
        (lambda logits: [None, logits], {"teacher_output": 1, "output": 1}),
        (lambda logits: {"head": logits}, {"teacher_output": "head", "output": "head"}),
    ],
)
def test_outputs_of_both_models(wrap, options, example):
    teacher, model = CountingTeacher(toys.mlp(16), wrap), CountingTeacher(toys.mlp(), wrap)
    expected = F.mse_loss(teacher.inner(VECTORS), model.inner(VECTORS)).item()
    config = DistillationConfig(teacher, criterion("MSE", 1.0, (0, 1)), **options)
    manager = prepare_compression(model, [config], example_inputs=VECTORS if example else None)
    assert first_loss(manager, VECTORS, model(VECTORS)).item() == pytest.approx(expected)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"student's logits must be .*shape \(\).*DistillationConfig\(output=\.\.\.\)"),
        ({"output": 1}, r"teacher's logits must be .*DistillationConfig\(teacher_output=\.\.\.\)"),
        ({"output": 2}, r"student returned 2 elements; output=2 is out of range"),
        ({"output": 1, "teacher_output": "a"}, r"teacher returned tuple, which holds no 'a'"),
    ],
)
def test_outputs_without_logits_are_refused(options, message, example):
    teacher, model = (
        CountingTeacher(toys.mlp(), lambda logits: (logits.sum(), logits)) for _ in range(2)
    )
    config = DistillationConfig(teacher, **options)

    def until_first_loss():
        example_inputs = VECTORS if example else None
        first_loss(
            prepare_compression(model, [config], example_inputs=example_inputs),
            VECTORS,
            model(VECTORS),
        )

    with pytest.raises(ConfigError, match=message):
        until_first_loss()


# The caller's teacher outputs ---------------------------------------------------------------------


def test_outputs_of_the_caller():
    config = DistillationConfig(
        criterion=criterion("MSE", 1.0, (0, 1)), teacher_outputs="caller", teacher_output="logits"
    )
    manager = begin(prepare_compression(toys.mlp(), [config], example_inputs=VECTORS))
    output = torch.zeros(4, toys.CLASSES, requires_grad=True)
    teacher_logits = torch.full((4, toys.CLASSES), 3.0, requires_grad=True)
    loss = manager.on_after_compute_loss(VECTORS, output, output.sum(), {"logits": teacher_logits})
    assert loss.item() == 9.0
    loss.backward()
    assert teacher_logits.grad is None
    assert output.grad is not None


def test_missing_outputs_of_the_caller():
    config = DistillationConfig(teacher_outputs="caller", name="offline")
    manager = begin(prepare_compression(toys.mlp(), [config]))
    output = torch.zeros(4, toys.CLASSES, requires_grad=True)
    with pytest.raises(ConfigError, match=r"plugin 'offline'.*no teacher_output; pass it"):
        manager.on_after_compute_loss(VECTORS, output, output.sum())


def test_a_teacher_of_its_own_is_run_whatever_the_caller_passes():
    teacher = CountingTeacher(toys.mlp())
    expected = teacher.inner(VECTORS).square().mean().item()
    configs = [
        DistillationConfig(teacher, criterion("MSE", 1.0, (0, 1))),
        DistillationConfig(criterion=criterion("MSE", 1.0, (0, 1)), teacher_outputs="caller"),
    ]
    manager = begin(prepare_compression(toys.mlp(), configs))
    output = torch.zeros(4, toys.CLASSES, requires_grad=True)
    manager.on_after_compute_loss(VECTORS, output, output.sum(), torch.full((4, 4), 2.0))
    metrics = published(manager)
    assert metrics["loss/distillation/MSE"] == pytest.approx(expected)
    assert metrics["loss/distillation_2/MSE"] == 4.0
