"""The teacher is frozen and in eval mode, and restored at close."""

import copy

import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError, Plugin, PluginConfig, hookimpl, prepare_compression
from compression_plugins import DistillationConfig, QATConfig
from toy_teachers import condition, first_loss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def batch(count=4, seed=0):
    return toys.images(count, seed).tensors[0]


def half_trained(model):
    """Switches modes and gradients to a mixture that must come back."""
    model.train()
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    return model


class FailingConfig(PluginConfig):
    plugin = "failing"


class FailingPlugin(Plugin[FailingConfig]):
    config_class = FailingConfig

    @hookimpl
    def prepare_model(self, context):
        raise ConfigError("no")


def test_is_frozen_in_eval_mode_from_prepare_on():
    teacher = half_trained(toys.ConvNet())
    prepare_compression(toys.ConvNet(), [DistillationConfig(teacher)])
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_close_restores_modes_and_gradients():
    teacher = half_trained(toys.ConvNet())
    before = condition(teacher)
    manager = prepare_compression(toys.ConvNet(), [DistillationConfig(teacher)])
    first_loss(manager, batch(), manager.model(batch()))
    teacher.train()
    manager.close()
    assert condition(teacher) == before


def test_two_instances_restore_their_common_teacher():
    teacher = half_trained(toys.ConvNet())
    before = condition(teacher)
    configs = [DistillationConfig(teacher), DistillationConfig(teacher)]
    prepare_compression(toys.ConvNet(), configs).close()
    assert condition(teacher) == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_managers_restore_their_common_teacher_in_any_order(order):
    teacher = half_trained(toys.ConvNet())
    before = condition(teacher)
    managers = [prepare_compression(toys.ConvNet(), [DistillationConfig(teacher)]) for _ in "ab"]
    frozen = condition(teacher)
    managers[order[0]].close()
    assert condition(teacher) == frozen
    managers[order[1]].close()
    assert condition(teacher) == before


@pytest.mark.parametrize("example_inputs", [None, torch.zeros(2, 1, 8, 8)])
def test_failing_prepare_restores_modes_and_gradients(example_inputs):
    teacher, model = half_trained(toys.ConvNet()), half_trained(toys.ConvNet())
    before = condition(teacher), condition(model)
    weights = copy.deepcopy((teacher.state_dict(), model.state_dict()))
    configs = [DistillationConfig(teacher), QATConfig(), FailingPlugin(FailingConfig())]
    with pytest.raises(ConfigError, match="no"):
        prepare_compression(model, configs, example_inputs=example_inputs)
    assert (condition(teacher), condition(model)) == before
    assert type(model.fc) is nn.Linear
    torch.testing.assert_close((teacher.state_dict(), model.state_dict()), weights, rtol=0, atol=0)


@pytest.mark.parametrize("call", [lambda t: t.train(), lambda t: t.bn2.train(), lambda t: None])
def test_runs_in_eval_mode_whatever_train_is_called_on(call):
    teacher = toys.ConvNet(dropout=0.5)
    with torch.no_grad():
        for _ in range(5):
            teacher(batch(8, seed=3))  # statistics that differ from any batch's
    expected = copy.deepcopy(teacher).eval()
    seen = []
    config = DistillationConfig(
        teacher, teacher_forward=lambda model, inputs: seen.append(model(inputs)) or seen[-1]
    )
    model = toys.ConvNet()
    manager = prepare_compression(model, [config])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    random_states = []

    def disturb(epoch, step, loss):
        call(teacher)
        random_states.append(torch.get_rng_state())

    loader = [(item, target) for item, target in toys.loader(toys.images())]
    inputs = [item for item, _ in loader] * 2
    call(teacher)
    toys.train(manager, loader, optimizer, 2, after_step=disturb)
    assert len(seen) == len(inputs)
    for logits, item in zip(seen, inputs, strict=True):
        assert torch.equal(logits, expected(item))
        assert not logits.requires_grad
    torch.testing.assert_close(teacher.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    # Dropout of a teacher in train mode would shift the student's random numbers.
    assert all(torch.equal(state, random_states[0]) for state in random_states)


def test_no_gradient_reaches_it_when_the_caller_unfreezes_it():
    teacher = toys.ConvNet()

    def forward(model, inputs):
        with torch.enable_grad():
            return model(inputs)

    manager = prepare_compression(
        toys.ConvNet(), [DistillationConfig(teacher, teacher_forward=forward)]
    )
    teacher.requires_grad_(True)
    first_loss(manager, batch(), manager.model(batch())).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in manager.model.parameters())


def test_is_no_part_of_the_student_or_of_its_state():
    model = toys.ConvNet()
    names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    teacher = toys.ConvNet(width=5)
    manager = prepare_compression(model, [DistillationConfig(teacher)])
    first_loss(manager, batch(), manager.model(batch()))
    assert (list(model.state_dict()), [name for name, _ in model.named_modules()]) == names
    manager.on_step_end()
    manager.on_epoch_end()
    state = manager.state_dict()
    assert set(state["plugins"]["distillation"]) == {"teacher_sha256"}
    assert len(state["plugins"]["distillation"]["teacher_sha256"]) == 64
    shapes = {tuple(tensor.shape) for tensor in tensors(state)}
    assert not shapes & {tuple(parameter.shape) for parameter in teacher.parameters()} - {(4,)}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return []
