"""Teachers on the device: moved there, and with quantized logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import toys
from compression_manager import prepare_compression
from compression_manager.quantization import choose_qparams, fake_quantize
from compression_manager.quantization.arithmetic.ranges import tensor_range
from compression_plugins import DistillationConfig, QATConfig, QuantizedTeacher
from device_runs import assert_same_bits
from toy_teachers import criterion


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_teacher_on_the_cpu_follows_the_student(temperature, device, tmp_path):
    teacher, model = toys.ConvNet(8), toys.ConvNet().to(device)
    config = DistillationConfig(teacher_model=teacher, criterion=criterion("KL", temperature))
    manager = prepare_compression(model, [config, QATConfig()])
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    manager.track(optimizer=optimizer)
    data = [
        (inputs.to(device), targets.to(device)) for inputs, targets in toys.loader(toys.images())
    ]
    before = copy.deepcopy(teacher.state_dict())
    losses = toys.train(manager, data, optimizer, 2)
    assert all(loss == loss for loss in losses)
    for name, value in teacher.state_dict().items():
        assert value.device.type == device.type
        assert_same_bits(value, before[name], name)
    manager.convert()


def test_the_loss_of_distillation_equals_the_cpus(device):
    inputs, targets = toys.images().tensors
    losses = []
    for at in (device, torch.device("cpu")):
        torch.manual_seed(0)
        teacher, student = toys.ConvNet(8).double(), toys.ConvNet().double()
        config = DistillationConfig(teacher_model=teacher, criterion=criterion("KL", 2.0))
        manager = prepare_compression(student.to(at), [config])
        manager.on_train_begin()
        manager.on_epoch_begin(0)
        manager.on_step_begin(0)
        given = inputs.to(at, torch.float64)
        output = student(given)
        loss = nn.functional.cross_entropy(output, targets.to(at))
        losses.append(float(manager.on_after_compute_loss(given, output, loss).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("bits", [1, 4, 8, 16, 24, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "fixed"])
@pytest.mark.filterwarnings("ignore:QuantizedTeacher clipped:UserWarning")
# torch's own, of the thread that runs the backward pass.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA")
def test_quantized_logits(bits, symmetric, dynamic, device):
    model = toys.mlp().to(device)
    teacher = QuantizedTeacher(model, bits, symmetric=symmetric, dynamic=dynamic)
    inputs = torch.randn(64, 6, device=device, requires_grad=True)
    output = teacher(inputs)
    logits = model(inputs).detach().cpu()
    scheme = teacher.scheme
    if dynamic:
        grid = choose_qparams(*tensor_range(logits, scheme), scheme)
    else:
        grid = (2.0 ** (1 - bits), 0)
    expected = fake_quantize(logits, *grid, scheme.quant_min, scheme.quant_max)
    assert_same_bits(output, expected)
    upstream = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, inputs, upstream)
    (wanted,) = torch.autograd.grad(model(inputs), inputs, upstream)
    assert torch.equal(gradient, wanted)


def test_a_quantized_teacher_warns_of_clipping(device):
    teacher = QuantizedTeacher(toys.mlp().to(device), scale=1e-4)
    with pytest.warns(UserWarning, match="clipped"):
        teacher(torch.randn(8, 6, device=device))


def test_a_quantized_teacher_moves(device):
    teacher = QuantizedTeacher(toys.mlp(), scale=0.1)
    there = teacher.to(device)(torch.randn(8, 6, device=device))
    assert there.device.type == device.type


def test_a_quantized_teacher_exports(device):
    teacher = QuantizedTeacher(toys.mlp().to(device), scale=0.1)
    inputs = torch.randn(8, 6, device=device)
    program = teacher.export_graph(inputs)
    torch.testing.assert_close(program.module()(inputs), teacher(inputs))


def test_int8_weights_of_a_teacher(device):
    model = toys.ConvNet(8).to(device)
    teacher = QuantizedTeacher(model, scale=0.05, weights=True)
    inputs = toys.images().tensors[0].to(device)
    distortion = teacher.distortion(inputs, model)
    assert distortion.kl < 0.05
    assert distortion.top1_agreement > 0.7


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "fixed"])
def test_a_quantized_teacher_in_distillation(dynamic, device):
    options = {"dynamic": True} if dynamic else {"scale": 0.1}
    teacher, model = QuantizedTeacher(toys.ConvNet(8), **options), toys.ConvNet().to(device)
    config = DistillationConfig(teacher_model=teacher, criterion=criterion())
    manager = prepare_compression(model, [config])
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    manager.track(optimizer=optimizer)
    data = [
        (inputs.to(device), targets.to(device)) for inputs, targets in toys.loader(toys.images())
    ]
    toys.train(manager, data, optimizer, 1)
