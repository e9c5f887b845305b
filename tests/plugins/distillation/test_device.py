"""The teacher follows its inputs to their device."""

import pytest
import torch
from torch import nn

import toys
from compression_manager.context import Context
from compression_plugins.distillation.teachers.teacher import Teacher
from toy_teachers import condition


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def on_meta(*shape):
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize(
    "inputs",
    [
        on_meta(2, 6),
        (on_meta(2, 6),),
        {"input": on_meta(2, 6)},
    ],
)
def test_follows_the_inputs_to_their_device(inputs):
    model = toys.mlp()
    if isinstance(inputs, dict):
        model = nn.Sequential(model)
        model.forward = lambda input: model[0](input)
    teacher = Teacher(model)
    assert teacher.run(inputs).device.type == "meta"
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_follows_the_accelerator_among_mixed_inputs():
    class Padded(nn.Linear):
        def forward(self, lengths, input):
            return super().forward(input)

    model = Padded(6, 3)
    for _ in range(2):
        output = Teacher(model).run((torch.tensor([3, 2]), on_meta(2, 6)))
        assert output.device.type == "meta"


def test_stays_where_it_is_when_it_is_on_several_devices():
    model = nn.ModuleDict({"first": nn.Linear(6, 3), "second": nn.Linear(6, 3, device="meta")})
    Teacher(model, lambda model, inputs: model["second"](inputs)).run(on_meta(2, 6))
    assert model["first"].weight.device.type == "cpu"


@pytest.mark.parametrize("inputs", [None, {"text": "a"}, (3,)])
def test_inputs_without_tensors_leave_it_where_it_is(inputs):
    model = toys.mlp()
    Teacher(model, lambda model, inputs: None).run(inputs)
    assert model[0].weight.device.type == "cpu"


def test_moves_once_and_is_frozen_and_restored_after_the_move():
    model = toys.mlp()
    model[0].bias.requires_grad_(False)
    before = condition(model)
    moves = []
    model.to = lambda device: moves.append(device) or nn.Module.to(model, device)
    context = Context(toys.mlp(), recipe={})
    teacher = Teacher(model)
    teacher.freeze(context, "test")
    for _ in range(3):
        teacher.run(on_meta(2, 6))
    assert moves == [torch.device("meta")]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert context.run_cleanup() == []
    assert condition(model) == before
