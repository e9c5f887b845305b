"""The logits and gradients of the quantized teacher."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from compression_plugins import QuantizedTeacher
from quantized_teachers import grid_of, quantized, range_grid

BITS = [1, 2, 4, 8, 16, 24, 25, 31, 32]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:QuantizedTeacher clipped")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_values_are_numpys_in_float64(bits, symmetric, data):
    logits = data.draw(hnp.arrays(np.float64, (3, 4), elements=st.floats(-50, 50)))
    scale, _, low, high = grid_of(bits, symmetric)
    zero_point = 0 if symmetric else data.draw(st.integers(low, high))
    options = data.draw(st.sampled_from([{}, {"scale": 0.37, "zero_point": zero_point}]))
    grid = (options.get("scale", scale), options.get("zero_point", 0), low, high)
    teacher = QuantizedTeacher(nn.Identity(), bits, symmetric=symmetric, **options)
    output = teacher(torch.tensor(logits))
    assert output.dtype == torch.float64
    np.testing.assert_array_equal(output.numpy(), quantized(logits, *grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_narrow_dtypes_are_within_half_a_level_and_their_own_rounding(bits, dtype):
    logits = torch.randn(64, 10).clamp(-2, 2).to(dtype)
    low, high = grid_of(bits, False)[2:]
    scale = 5.0 / (high - low)
    teacher = QuantizedTeacher(nn.Identity(), bits, scale=scale, zero_point=0, symmetric=False)
    if bits < 3:
        teacher = QuantizedTeacher(nn.Identity(), bits, symmetric=False, dynamic=True)
        scale = 4.0 / (high - low)
    output = teacher(logits)
    assert output.dtype == dtype
    error = (output.double() - logits.double()).abs().max().item()
    assert error <= scale / 2 + 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bits", BITS)
def test_default_scale_spans_one_and_zero_point_is_zero(bits):
    teacher = QuantizedTeacher(nn.Identity(), bits)
    assert teacher.scale.item() == 2.0 ** (1 - bits)
    assert teacher.zero_point.item() == 0
    assert teacher.scale.dtype == torch.float32
    assert not teacher.zero_point.is_floating_point()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(logits=hnp.arrays(np.float64, (3, 4), elements=st.floats(-50, 50, width=32)))
def test_dynamic_range_is_that_of_the_batch(bits, symmetric, logits):
    teacher = QuantizedTeacher(nn.Identity(), bits, symmetric=symmetric, dynamic=True)
    output = teacher(torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(output, quantized(logits, *range_grid(logits, bits, symmetric)))


def test_dynamic_range_follows_every_batch_and_keeps_nothing():
    teacher = QuantizedTeacher(nn.Identity(), dynamic=True)
    small, large = torch.tensor([[0.1, -0.2]]), torch.tensor([[100.0, -3.0]])
    for batch in (small, large, small):
        expected = quantized(batch.double().numpy(), *range_grid(batch.numpy(), 8, True))
        np.testing.assert_allclose(teacher(batch).numpy(), expected, rtol=1e-6)
    assert set(teacher.state_dict()) == {"quant_range"}


@pytest.mark.filterwarnings("ignore:QuantizedTeacher clipped")
@pytest.mark.parametrize("dynamic", [True, False])
def test_infinities_become_the_ends_of_the_finite_range_and_nan_stays(dynamic):
    logits = torch.tensor([[1.0, -2.0, torch.inf, -torch.inf, torch.nan]])
    output = QuantizedTeacher(nn.Identity(), dynamic=dynamic)(logits)
    end = 2.0 if dynamic else 127 / 128
    assert output[0, 2:4].tolist() == pytest.approx([end, -end])
    assert output[0, 4].isnan()


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_an_empty_batch_stays_empty(dynamic, shape):
    assert QuantizedTeacher(nn.Identity(), dynamic=dynamic)(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("bits", [8, 32])
def test_the_largest_numbers_do_not_overflow(bits):
    logits = torch.tensor([[3e38, -3e38, 1.0]])
    for symmetric in (True, False):
        teacher = QuantizedTeacher(nn.Identity(), bits, symmetric=symmetric, dynamic=True)
        assert teacher(logits).isfinite().all()
        assert teacher(logits.double() * 1e200).isfinite().all()


@pytest.mark.filterwarnings("ignore:QuantizedTeacher clipped")
@pytest.mark.parametrize("dynamic", [True, False])
def test_every_gradient_passes_to_the_inputs_also_of_clipped_logits(dynamic):
    model = nn.Linear(6, 4).double()
    inputs = (10 * torch.randn(5, 6, dtype=torch.float64)).requires_grad_()
    teacher = QuantizedTeacher(model, dynamic=dynamic)
    grad_output = torch.randn(5, 4, dtype=torch.float64)
    teacher(inputs).backward(grad_output)
    expected = grad_output.numpy() @ model.weight.detach().numpy()
    np.testing.assert_allclose(inputs.grad.numpy(), expected, rtol=1e-12)
    assert model.weight.grad is None
