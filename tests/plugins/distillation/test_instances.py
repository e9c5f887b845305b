"""Several instances in one list, and resuming."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import toys
from compression_manager import (
    CheckpointMismatchError,
    ConfigError,
    prepare_compression,
)
from compression_plugins import DistillationConfig, TeacherRuntime
from toy_teachers import CountingTeacher, begin, criterion, first_loss, published

VECTORS = toys.vectors(4).tensors[0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Several instances --------------------------------------------------------------------------------


def test_two_instances_have_terms_of_their_own_and_run_one_teacher_once():
    inputs, targets = toys.vectors(8).tensors
    teacher, model = CountingTeacher(toys.mlp(16)), toys.mlp()
    configs = [
        DistillationConfig(teacher, criterion("KL", 4.0, (0.5, 0.3))),
        DistillationConfig(teacher, criterion("MSE", 1.0, (0.5, 0.2))),
        DistillationConfig(teacher, criterion("KL", 1.0, (0.5, 0.1)), name="sharp"),
    ]
    manager = begin(prepare_compression(model, configs))
    output = model(inputs)
    total = manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
    assert len(teacher.calls) == 1
    metrics = published(manager)
    expected = (
        0.5 * metrics["loss/task"]
        + 0.3 * metrics["loss/distillation/KL"]
        + 0.2 * metrics["loss/distillation_2/MSE"]
        + 0.1 * metrics["loss/sharp/KL"]
    )
    assert total.item() == pytest.approx(expected)
    assert len({round(value, 6) for value in metrics.values()}) == len(metrics) == 5


def test_two_teachers_are_two_teachers():
    first, second = CountingTeacher(toys.mlp()), CountingTeacher(toys.mlp())
    configs = [DistillationConfig(item, criterion("MSE")) for item in (first, second)]
    manager = prepare_compression(toys.mlp(), configs)
    first_loss(manager, VECTORS)
    metrics = published(manager)
    assert (len(first.calls), len(second.calls)) == (1, 1)
    assert metrics["loss/distillation/MSE"] != metrics["loss/distillation_2/MSE"]


def test_different_calls_of_one_teacher_are_not_mixed_up():
    class Doubling:
        __hash__ = None

        def __call__(self, model, inputs):
            return model(2 * inputs)

    teacher = CountingTeacher(toys.mlp())
    mse = criterion("MSE", 1.0, (0, 1))
    configs = [
        DistillationConfig(teacher, mse),
        DistillationConfig(teacher, mse, teacher_forward=Doubling()),
    ]
    first_loss(prepare_compression(toys.mlp(), configs), VECTORS)
    (first,), (second,) = (args for args, _ in teacher.calls)
    assert torch.equal(2 * first, second)


def test_different_precisions_of_one_teacher_are_not_mixed_up():
    teacher = toys.mlp()
    exact = DistillationConfig(teacher, criterion("MSE"), name="exact")
    rounded = DistillationConfig(
        teacher, criterion("MSE"), name="rounded", teacher_runtime=TeacherRuntime("bfloat16")
    )
    manager = prepare_compression(toys.mlp(), [exact, rounded])
    first_loss(manager, VECTORS)
    values = published(manager)
    assert values["loss/exact/MSE"] != values["loss/rounded/MSE"]
    assert values["loss/exact/MSE"] == pytest.approx(values["loss/rounded/MSE"], rel=0.05)


def test_teacher_runs_once_per_loss_under_gradient_accumulation():
    teacher, model = CountingTeacher(toys.mlp()), toys.mlp()
    configs = [DistillationConfig(teacher), DistillationConfig(teacher)]
    manager = begin(prepare_compression(model, configs))
    batches = [toys.vectors(4, seed).tensors for seed in range(3)]
    for inputs, targets in batches:
        output = model(inputs)
        manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets)).backward()
    manager.on_before_optimizer_step()
    assert [args[0] for args, _ in teacher.calls] == [inputs for inputs, _ in batches]


def test_instances_must_agree_on_the_weight_of_the_task():
    teacher, model = toys.mlp(), toys.mlp()
    configs = [
        DistillationConfig(teacher, criterion(weights=(0.5, 0.5))),
        DistillationConfig(teacher, criterion(weights=(0.4, 0.5)), name="second"),
    ]
    with pytest.raises(ConfigError, match=r"'distillation' sets 0\.5, 'second' sets 0\.4"):
        prepare_compression(model, configs)
    assert all(module.training for module in teacher.modules())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_two_instances_in_one_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "plugins:\n"
        "  distillation: {criterion: {temperature: 4}}\n"
        "  second: {plugin: distillation, criterion: {loss_types: [CE, MSE]}}\n"
    )
    first, second = CountingTeacher(toys.mlp()), CountingTeacher(toys.mlp())
    manager = prepare_compression(
        toys.mlp(), path, **{"distillation.teacher_model": first, "second.teacher_model": second}
    )
    first_loss(manager, VECTORS)
    assert {"loss/distillation/CE", "loss/second/MSE"} <= set(published(manager))
    assert (len(first.calls), len(second.calls)) == (1, 1)


# State --------------------------------------------------------------------------------------------


def test_resuming_with_the_same_teacher():
    teacher = toys.ConvNet()
    state = prepare_compression(toys.ConvNet(), [DistillationConfig(teacher)]).state_dict()
    fresh = prepare_compression(toys.ConvNet(), [DistillationConfig(copy.deepcopy(teacher))])
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.model.state_dict(), state["model"], rtol=0, atol=0)


def test_resuming_with_another_precision_of_the_same_teacher():
    teacher = toys.mlp()
    state = prepare_compression(toys.mlp(), [DistillationConfig(teacher)]).state_dict()
    config = DistillationConfig(teacher, teacher_runtime=TeacherRuntime("bfloat16"))
    prepare_compression(toys.mlp(), [config]).load_state_dict(state)


@pytest.mark.parametrize("other", ["retrained", "none"])
def test_resuming_with_another_teacher(other):
    teacher = toys.mlp()
    state = prepare_compression(toys.mlp(), [DistillationConfig(teacher)]).state_dict()
    changed = copy.deepcopy(teacher)
    with torch.no_grad():
        changed[0].weight[0, 0] = math.nextafter(changed[0].weight[0, 0].item(), 9) + 1e-7
    configs = {
        "retrained": DistillationConfig(changed),
        "none": DistillationConfig(teacher_outputs="caller"),
    }
    manager = prepare_compression(toys.mlp(), [configs[other]])
    before = copy.deepcopy(manager.model.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r"'distillation'.*another teacher"):
        manager.load_state_dict(state)
    torch.testing.assert_close(manager.model.state_dict(), before, rtol=0, atol=0)


def test_resuming_a_run_without_teacher_with_one():
    state = prepare_compression(
        toys.mlp(), [DistillationConfig(teacher_outputs="caller")]
    ).state_dict()
    manager = prepare_compression(toys.mlp(), [DistillationConfig(toys.mlp())])
    with pytest.raises(CheckpointMismatchError, match="'distillation'"):
        manager.load_state_dict(state)
