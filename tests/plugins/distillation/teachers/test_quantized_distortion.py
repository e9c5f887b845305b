"""How far the quantized teacher's predictions are from the float ones."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError
from compression_plugins import QuantizedTeacher
from compression_plugins.distillation import TeacherDistortion
from quantized_teachers import quantized
from toy_teachers import condition


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def reference(exact, other):
    """Mean KL(softmax(exact) || softmax(other)) and agreement of the largest, in float64."""

    def log_softmax(logits):
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    log_exact, log_other = log_softmax(exact), log_softmax(other)
    kl = (np.exp(log_exact) * (log_exact - log_other)).sum(-1).mean()
    return kl, (exact.argmax(-1) == other.argmax(-1)).mean()


@pytest.mark.filterwarnings("ignore:QuantizedTeacher clipped")
@pytest.mark.parametrize("shape", [(64, 10), (8, 5, 3)])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_kl_and_agreement_are_numpys_in_float64(bits, shape):
    logits = torch.randn(shape, dtype=torch.float64)
    teacher = QuantizedTeacher(nn.Identity(), bits, scale=4 / 2**bits)
    exact = logits.numpy()
    top = 2 ** (bits - 1) - 1
    kl, agreement = reference(exact, quantized(exact, 4 / 2**bits, 0, -top, top))
    result = teacher.distortion(logits)
    assert result.kl == pytest.approx(kl, rel=1e-9)
    assert result.top1_agreement == pytest.approx(agreement)
    assert bits == 8 or (kl > 1e-3 and agreement < 1)


def test_more_bits_distort_less():
    inputs = 4 * torch.randn(256, 6)
    results = [
        QuantizedTeacher(toys.mlp(16), bits, dynamic=True).distortion(inputs) for bits in (2, 4, 8)
    ]
    kls = [result.kl for result in results]
    assert kls == sorted(kls, reverse=True)
    assert 0 < kls[-1] < 1e-3


def test_is_a_frozen_dataclass_of_two_numbers():
    result = QuantizedTeacher(toys.mlp(), scale=0.1).distortion(torch.randn(2, 6))
    assert dataclasses.asdict(result).keys() == {"kl", "top1_agreement"}
    assert all(isinstance(value, float) for value in dataclasses.astuple(result))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.kl = 0.0


def test_another_float_teacher_can_be_compared_with():
    model, other = toys.mlp(), toys.mlp()
    inputs = torch.randn(16, 6)
    teacher = QuantizedTeacher(model, bits=24, scale=1e-5)
    with torch.no_grad():
        kl, agreement = reference(other(inputs).double().numpy(), model(inputs).double().numpy())
    result = teacher.distortion(inputs, other)
    assert result.kl == pytest.approx(kl, rel=1e-3)
    assert result.top1_agreement == pytest.approx(agreement)
    assert condition(other) == condition(toys.mlp())


def test_takes_what_the_loop_passes_and_leaves_modes_and_random_state():
    model = toys.ConvNet(dropout=0.5)
    teacher, inputs = QuantizedTeacher(model, scale=0.1), torch.randn(4, 1, 8, 8)
    random_state = torch.get_rng_state()
    expected = teacher.distortion(inputs)
    model.train()
    results = [
        teacher.distortion(given, model)
        for given in (inputs, (inputs,), {"input": inputs, "labels": torch.zeros(4)})
    ]
    assert results == [expected] * 3
    assert expected.kl < 1e-2
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_empty_batch_or_other_classes_are_refused():
    teacher = QuantizedTeacher(toys.mlp())
    with pytest.raises(ConfigError, match=r"float teacher's have shape \(0, 4\)"):
        teacher.distortion(torch.randn(0, 6))
    with pytest.raises(ConfigError, match=r"shape \(2, 7\), the quantized teacher's \(2, 4\)"):
        teacher.distortion(torch.randn(2, 6), toys.mlp(classes=7))


def test_equal_predictions_have_no_distortion():
    logits = torch.tensor([[0.5, -0.25], [0.0, 0.125]])
    assert QuantizedTeacher(nn.Identity()).distortion(logits) == TeacherDistortion(0.0, 1.0)
