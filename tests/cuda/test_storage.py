"""Integer storage of weights is the same on every device, and moves between them."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch

import toys
from compression_manager.quantization import (
    HistogramCalibration,
    PercentileCalibration,
    QuantizationScheme,
    Quantizer,
)
from compression_manager.quantization.storage.packing import pack_bits, unpack_bits
from device_runs import assert_same_bits, assert_same_state
from integer_weights import TiedModel

SCHEMES = [
    QuantizationScheme(8, False),
    QuantizationScheme(),
    QuantizationScheme(granularity="channel"),
    QuantizationScheme(16, False, "channel"),
    QuantizationScheme(32),
    QuantizationScheme(4, granularity="group", group_size=32),
    QuantizationScheme(3, False, "group", group_size=5),
    QuantizationScheme(1, False, "channel"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
def test_packed_bits_equal_the_cpus(bits, count, device):
    values = torch.randint(1 << bits, (count,), dtype=torch.uint8)
    packed = pack_bits(values.to(device), bits)
    assert_same_bits(packed, pack_bits(values, bits))
    assert_same_bits(unpack_bits(packed, bits, count), values)


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_on_the_device_stores_what_one_on_the_cpu_does(scheme, dtype, device):
    here = toys.ConvNet().to(dtype).eval()
    there = copy.deepcopy(here).to(device)
    quantizer = Quantizer(scheme)
    for model in (here, there):
        quantizer.quantize_weights(model)
    assert_same_state(there.state_dict(), here.state_dict())
    assert there(torch.randn(2, 1, 8, 8, dtype=dtype, device=device)).isfinite().all()
    for model in (here, there):
        quantizer.dequantize_weights(model)
    assert_same_state(there.state_dict(), here.state_dict())


@every_scheme
def test_a_state_dict_goes_to_the_cpu_and_back(scheme, device, tmp_path):
    quantizer = Quantizer(scheme)
    first = quantizer.quantize_weights(toys.ConvNet().to(device))
    safetensors.torch.save_file(first.state_dict(), tmp_path / "weights.safetensors")
    second = quantizer.prepare(toys.ConvNet())
    second.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"))
    assert_same_state(first.state_dict(), second.state_dict())
    third = quantizer.prepare(toys.ConvNet().to(device))
    third.load_state_dict(second.state_dict())
    assert_same_state(third.state_dict(), second.state_dict())
    assert next(iter(third.state_dict().values())).device.type == device.type
    assert_same_state(second.to(device).state_dict(), first.cpu().state_dict())


def test_tied_weights_stay_tied(device):
    model = TiedModel().to(device)
    quantizer = Quantizer(QuantizationScheme(4, granularity="channel"))
    quantizer.quantize_weights(model)
    assert model(torch.arange(12, device=device)).device.type == device.type
    quantizer.dequantize_weights(model)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.device.type == device.type


@pytest.mark.parametrize("calibration", [PercentileCalibration(99.0), HistogramCalibration()])
def test_ranges_that_clip(calibration, device):
    model = toys.mlp(64).to(device)
    scheme = QuantizationScheme(4, granularity="channel")
    quantizer = Quantizer(scheme, calibration)
    quantizer.quantize_weights(model)
    assert all(item.sqnr_db > 10 for item in quantizer.report(model).weights if item.sqnr_db)


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
def test_a_recurrent_layer(device):
    torch.manual_seed(0)
    model = torch.nn.LSTM(6, 4).to(device)
    inputs = torch.randn(5, 2, 6, device=device)
    quantizer = Quantizer(QuantizationScheme(granularity="channel"))
    output = quantizer.quantize_weights(model)(inputs)[0]
    expected = quantizer.dequantize_weights(model)(inputs)[0]
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
