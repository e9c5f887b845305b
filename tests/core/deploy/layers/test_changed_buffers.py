"""A deployed layer computes with what its buffers hold now, however that came there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compression_manager import prepare_compression
from compression_manager.quantization import QuantizationScheme
from compression_plugins import PTQConfig

CHANNELS = QuantizationScheme(bits=8, symmetric=True, granularity="channel", axis=0)
TENSOR = QuantizationScheme(bits=8, symmetric=True)
FEW_BITS = QuantizationScheme(bits=4, symmetric=True, granularity="channel", axis=0)


@pytest.mark.parametrize("buffer", ["weight", "weight_scale", "input_scale", "input_zero_point"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("scheme", [CHANNELS, TENSOR, FEW_BITS], ids=["channels", "tensor", "4"])
@pytest.mark.parametrize("layer", [nn.Linear(40, 24), nn.Conv2d(8, 24, 3)], ids=["linear", "conv"])
def test_what_is_written_to_a_buffer_without_a_trace_counts(layer, scheme, mode, buffer):
    torch.manual_seed(0)
    inputs = torch.randn(5, 40) if isinstance(layer, nn.Linear) else torch.randn(5, 8, 6, 6)
    config = PTQConfig(weight=scheme, calibration_data=[inputs])
    with prepare_compression(nn.Sequential(copy.deepcopy(layer)), [config]) as manager:
        converted = manager.convert()
    with mode():
        before = converted(inputs)
        held = converted[0]._buffers[buffer]
        held.data.copy_(held.data.flip(0) if held.dim() else held.data + held.data // 2 + 1)
        fresh = copy.deepcopy(converted)
        assert torch.equal(converted(inputs), fresh(inputs))
        assert not torch.equal(converted(inputs), before)
