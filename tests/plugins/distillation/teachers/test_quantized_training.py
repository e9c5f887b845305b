"""The quantized teacher in a training run."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import toys
from compression_manager import CheckpointMismatchError, prepare_compression
from compression_plugins import DistillationConfig, QuantizedTeacher
from compression_plugins.distillation import KnowledgeDistillationLossConfig
from quantized_teachers import quantized
from toy_teachers import begin, condition, criterion, published


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run(teacher, *, epochs=3):
    """Train a student on a teacher alone; the manager and the losses."""
    torch.manual_seed(1)
    student = toys.mlp()
    loss = KnowledgeDistillationLossConfig(1.0, ("CE", "MSE"), (0.0, 1.0))
    manager = prepare_compression(student, [DistillationConfig(teacher, loss)])
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    losses = toys.train(manager, toys.loader(toys.vectors(), shuffle=False), optimizer, epochs)
    return manager, losses


@pytest.mark.filterwarnings("ignore:QuantizedTeacher clipped")
def test_the_loss_is_that_of_the_quantized_logits():
    inputs, targets = toys.vectors(8).tensors
    model, student = toys.mlp(16), toys.mlp()
    config = DistillationConfig(QuantizedTeacher(model, 3, scale=0.2), criterion("MSE"))
    manager = begin(prepare_compression(student, [config], example_inputs=inputs[:2]))
    output = student(inputs)
    manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
    with torch.no_grad():
        levels = quantized(model(inputs).double().numpy(), 0.2, 0, -3, 3)
    expected = np.mean((output.detach().double().numpy() - levels) ** 2)
    assert published(manager)["loss/distillation/MSE"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{"scale": 0.1}, {"dynamic": True}])
def test_a_student_learns_from_it_and_the_teacher_stays(options):
    teacher = QuantizedTeacher(toys.mlp(16), **options)
    before, modes = copy.deepcopy(teacher.state_dict()), condition(teacher)
    manager, losses = run(teacher)
    assert losses[-1] < losses[0] / 2
    toys.assert_identical(dict(teacher.state_dict()), dict(before))
    manager.close()
    assert condition(teacher) == modes
    assert teacher.output_dimension == toys.CLASSES


def test_a_wrong_output_dimension_is_found_before_the_first_step():
    config = DistillationConfig(QuantizedTeacher(toys.mlp(), output_dimension=3))
    with pytest.raises(Exception, match="output_dimension is 3, but the teacher's logits have 4"):
        prepare_compression(toys.mlp(), [config], example_inputs=torch.randn(2, 6))


@pytest.mark.parametrize("other", [{"scale": 0.2}, {"bits": 4, "scale": 0.1}])
def test_a_run_continues_only_with_the_same_quantization(other):
    model = toys.mlp(16)
    manager, _ = run(QuantizedTeacher(model, scale=0.1), epochs=1)
    state = manager.state_dict()
    same = run(QuantizedTeacher(copy.deepcopy(model), scale=0.1), epochs=0)[0]
    same.load_state_dict(state)
    changed = run(QuantizedTeacher(model, **other), epochs=0)[0]
    with pytest.raises(CheckpointMismatchError, match="another teacher"):
        changed.load_state_dict(state)
