"""The quantized teacher with int8 weights."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import toys
from compression_manager import ConfigError, prepare_compression
from compression_plugins import DistillationConfig, QuantizedTeacher
from quantization_reference import fake_quantized, weight_grid
from quantized_teachers import quantized, range_grid
from toy_teachers import begin, condition


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def size_in_bytes(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def numpy_logits(model, inputs):
    """The logits of an MLP whose weights went through int8 per output channel, in float64."""
    hidden = inputs.double().numpy()
    for index in (0, 2):
        layer = model[index]
        weight = layer.weight.detach().numpy()
        rounded, _ = fake_quantized(weight, weight_grid(weight), 0)
        hidden = hidden @ rounded.astype(np.float64).T + layer.bias.detach().double().numpy()
        hidden = np.maximum(hidden, 0) if index == 0 else hidden
    return hidden


def test_logits_are_those_of_int8_weights_per_channel():
    model, inputs = toys.mlp(32), torch.randn(16, 6)
    teacher = QuantizedTeacher(model, 24, dynamic=True, weights=True)
    expected = numpy_logits(model, inputs)
    np.testing.assert_allclose(teacher(inputs).numpy(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert np.abs(model(inputs).numpy() - expected).max() > 1e-4


def test_takes_about_a_quarter_of_the_memory():
    model = toys.mlp(512, 512)
    assert size_in_bytes(QuantizedTeacher(model, weights=True)) < 0.27 * size_in_bytes(model)


def test_the_original_is_untouched_and_not_kept():
    model = toys.ConvNet(dropout=0.5)
    before, modes = copy.deepcopy(model.state_dict()), condition(model)
    teacher = QuantizedTeacher(model, scale=0.1, weights=True)
    teacher(torch.randn(2, 1, 8, 8))
    toys.assert_identical(model.state_dict(), before)
    assert condition(model) == modes
    own = {id(tensor) for tensor in [*teacher.parameters(), *teacher.buffers()]}
    assert not own & {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    assert not own & {id(module) for module in model.modules()}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_distortion_needs_the_original():
    model, inputs = toys.mlp(32), torch.randn(64, 6)
    teacher = QuantizedTeacher(model, dynamic=True, weights=True)
    with pytest.raises(ConfigError, match=r"pass the original model: distortion\(inputs, float_"):
        teacher.distortion(inputs)
    with torch.no_grad():
        exact = model(inputs).double()
    other = numpy_logits(model, inputs)
    other = torch.tensor(quantized(other, *range_grid(other, 8, True)))
    kl = F.kl_div(other.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="sum")
    result = teacher.distortion(inputs, model)
    assert result.kl == pytest.approx(kl.item() / 64, rel=1e-2)
    assert result.top1_agreement == (exact.argmax(-1) == other.argmax(-1)).double().mean()


def test_exports_moves_copies_and_loads():
    inputs = torch.randn(5, 6)
    teacher = QuantizedTeacher(toys.mlp(16), scale=0.1, weights=True)
    expected = teacher(inputs)
    assert torch.equal(teacher.export_graph(torch.randn(2, 6)).module()(inputs), expected)
    assert torch.equal(copy.deepcopy(teacher)(inputs), expected)
    other = QuantizedTeacher(toys.mlp(16), scale=0.1, weights=True)
    other.load_state_dict(teacher.state_dict())
    assert torch.equal(other(inputs), expected)


def test_teaches_in_a_training_run():
    model, student = toys.mlp(16), toys.mlp()
    teacher = QuantizedTeacher(model, scale=0.1, weights=True)
    manager = begin(prepare_compression(student, [DistillationConfig(teacher)]))
    inputs, targets = toys.vectors(8).tensors
    output = student(inputs)
    loss = manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
    loss.backward()
    assert loss.isfinite()
    manager.close()
