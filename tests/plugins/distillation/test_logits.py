"""Logits that do not fit together are refused before anything changes."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import (
    ConfigError,
    prepare_compression,
)
from compression_plugins import DistillationConfig, QATConfig
from toy_teachers import begin


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("quantized", [True, False])
def test_other_widths_are_refused_at_prepare_with_example_inputs(quantized):
    model = toys.ConvNet(dropout=0.5)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Dropout())
    example_inputs = torch.randn(2, 1, 8, 8)
    before = copy.deepcopy(model.state_dict()), random_states()
    configs = [*([QATConfig()] if quantized else []), DistillationConfig(teacher)]
    with pytest.raises(ConfigError, match=r"differ in their classes: \(2, 4\) and \(2, 7\)"):
        prepare_compression(model, configs, example_inputs=example_inputs)
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    assert random_states() == before[1]
    assert type(model.fc) is nn.Linear
    for item in (model, teacher):
        assert all(module.training for module in item.modules())
        assert all(parameter.requires_grad for parameter in item.parameters())


def test_checking_example_inputs_changes_nothing():
    example_inputs = torch.randn(2, 1, 8, 8)
    model, teacher = toys.ConvNet(dropout=0.5), toys.ConvNet(width=6, dropout=0.5)
    teacher.bn1.eval()
    before = copy.deepcopy((model.state_dict(), teacher.state_dict())), random_states()
    modes = [module.training for module in model.modules()]
    prepare_compression(model, [DistillationConfig(teacher)], example_inputs=example_inputs)
    after = (model.state_dict(), teacher.state_dict()), random_states()
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1] == before[1]
    assert [module.training for module in model.modules()] == modes


def test_other_widths_are_refused_in_the_first_step_without_example_inputs():
    inputs, targets = toys.vectors(8).tensors
    model = toys.mlp()
    teacher = nn.Sequential(toys.mlp(classes=7), nn.Dropout())
    manager = begin(prepare_compression(model, [DistillationConfig(teacher)]))
    before = copy.deepcopy(model.state_dict()), random_states()
    output = model(inputs)
    with pytest.raises(ConfigError, match=r"differ in their classes: \(8, 4\) and \(8, 7\)"):
        manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    assert random_states() == before[1]


def test_other_shapes_are_told_apart_from_other_classes():
    config = DistillationConfig(teacher_outputs="caller")
    manager = begin(prepare_compression(toys.mlp(), [config]))
    output = torch.zeros(4, toys.CLASSES, requires_grad=True)
    with pytest.raises(ConfigError, match=r"differ in their shapes: \(4, 4\) and \(1, 4\)"):
        manager.on_after_compute_loss(output, output, output.sum(), output[:1].detach())
