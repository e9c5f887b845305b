"""Inputs quantized with their own range."""

import numpy as np
import pytest
import torch

from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    DynamicFakeQuantizer,
    QuantizationScheme,
    QuantizationSite,
    fake_quantize,
)

SITE = QuantizationSite("fc", "activation")
TENSOR = QuantizationScheme(8, False, dynamic=True, signed=False)
TOKEN = QuantizationScheme(8, granularity="token", dynamic=True)


def reference(x, symmetric):
    """One scale for all of x, in numpy."""
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    if symmetric:
        scale = np.float32(max(-low, high) / np.float32(127))
        code = np.clip(np.rint(x * (np.float32(1) / scale)), -127, 127)
        return code * scale
    scale = np.float32((high - low) / np.float32(255))
    zero_point = np.clip(-np.rint(low / scale), 0, 255).astype(np.float32)
    code = np.clip(np.rint(x * (np.float32(1) / scale)) + zero_point, 0, 255)
    return (code - zero_point) * scale


def switched_on(scheme):
    quantizer = DynamicFakeQuantizer(scheme, SITE)
    quantizer.set_phase(observing=True, quantizing=True)
    return quantizer


@pytest.mark.parametrize("training", [True, False])
def test_equals_numpy(training):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    output = switched_on(TENSOR).train(training)(x)
    np.testing.assert_array_equal(output.numpy(), reference(x.numpy(), symmetric=False))
    output = switched_on(TOKEN).train(training)(x)
    for index in np.ndindex(2, 5):
        expected = reference(x[index].numpy(), symmetric=True)
        np.testing.assert_array_equal(output[index].numpy(), expected)


def test_gradient_passes_everywhere():
    x = torch.randn(4, 6, requires_grad=True)
    switched_on(TOKEN)(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(4, 6))


def test_gradient_passes_where_rounding_the_zero_point_clips_an_end():
    """Both ends lie in the middle between two integers, which are one too many together."""
    x = (torch.tensor([-155.5, 0.0, 99.5]) / 128).requires_grad_()
    output = switched_on(TENSOR)(x)
    assert (output * 128).tolist() == [-156.0, 0.0, 99.0]
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_off_until_switched_on_and_the_state_keeps_it():
    quantizer, x = DynamicFakeQuantizer(TENSOR, SITE), torch.randn(4)
    assert quantizer(x) is x
    assert quantizer.is_calibrated()
    quantizer.load_state_dict(switched_on(TENSOR).state_dict())
    assert quantizer.phase.quantizing
    assert quantizer(x) is not x


def test_its_parameters_need_the_input():
    quantizer = switched_on(TENSOR)
    with pytest.raises(QuantizationError, match="dynamic and needs the input itself"):
        quantizer.quantization_parameters()
    parameters = quantizer.quantization_parameters(torch.tensor([-1.0, 1.55]))
    assert parameters.scale.item() == pytest.approx(0.01)
    assert parameters.zero_point.item() == 100


@pytest.mark.parametrize("scheme", [TENSOR, TOKEN])
def test_its_parameters_are_those_of_its_forward_pass(scheme):
    quantizer = switched_on(scheme)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    output = fake_quantize(x, **vars(quantizer.quantization_parameters(x)))
    assert torch.equal(output, quantizer(x))


def test_nan_stays_within_its_token():
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    output = switched_on(TOKEN)(x)
    assert output[0].isnan().all()
    assert output[1].isfinite().all()
