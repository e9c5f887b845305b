"""A teacher that training the student would change is refused."""

import copy

import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError, prepare_compression
from compression_plugins import DistillationConfig, QATConfig
from toy_teachers import condition, first_loss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def same():
    model = toys.mlp()
    return model, model


def part():
    model = nn.Sequential(toys.mlp(), toys.mlp(4))
    return model, model[0]


def wrapper():
    model = toys.mlp()
    return model, nn.Sequential(model)


def shared_layer():
    model, teacher = toys.mlp(), toys.mlp()
    teacher[2] = model[2]
    return model, teacher


def shared_frozen_layer():
    model, teacher = shared_layer()
    teacher[2].requires_grad_(False)
    return model, teacher


def shared_parameter():
    model, teacher = toys.mlp(), toys.mlp()
    teacher[2].bias = model[2].bias
    return model, teacher


def shared_memory():
    model, teacher = toys.mlp(), toys.mlp()
    teacher.load_state_dict(model.state_dict(), assign=True)
    return model, teacher


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (same, "the teacher is the student itself"),
        (part, "the teacher is the student itself, a part of it"),
        (wrapper, "or a model around it"),
        (shared_layer, "module '2' is also the student's '2'"),
        (shared_frozen_layer, "module '2' is also the student's '2'"),
        (shared_parameter, r"parameter '2.bias' is the student's trainable '2.bias'"),
        (shared_memory, r"parameter '0.weight' is the student's trainable '0.weight'"),
    ],
)
def test_a_teacher_that_training_would_change_is_refused(make, message):
    model, teacher = make()
    teacher.train()
    before = condition(model), condition(teacher)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        prepare_compression(model, [QATConfig(), DistillationConfig(teacher)])
    assert (condition(model), condition(teacher)) == before
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


def test_a_frozen_parameter_may_be_shared():
    model, teacher = shared_parameter()
    model[2].bias.requires_grad_(False)
    prepare_compression(model, [DistillationConfig(teacher)]).close()


def test_a_module_without_state_may_be_shared_and_keeps_the_students_mode():
    modes = []

    class Seen(nn.Module):
        def forward(self, input):
            modes.append(self.training)
            return input

    seen = Seen()
    model, teacher = (nn.Sequential(nn.Linear(6, 4), seen) for _ in range(2))
    manager = prepare_compression(model, [DistillationConfig(teacher)])
    assert seen.training
    inputs = toys.vectors(4).tensors[0]
    first_loss(manager, inputs, model(inputs))
    assert modes == [True, False]
    assert all(module.training for module in model.modules())
    seen.eval()
    manager.close()
    assert not seen.training


def test_lazy_and_meta_parameters_can_be_compared():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
        teacher = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    prepare_compression(model, [DistillationConfig(teacher)]).close()
