"""Training, converting and serving on the device what the CPU then computes as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantization_matrix as matrix
import toys
from compression_manager import CompressionManager, deploy, prepare_compression
from compression_manager.deploy.parity import full_precision
from compression_manager.quantization import QuantizationScheme
from compression_plugins import (
    BatchNormReestimationConfig,
    CalibrationConfig,
    LearnedScaleConfig,
    PTQConfig,
    QATConfig,
)
from device_runs import assert_same_state, moved, no_waiting
from toys import ConvNet

# cuDNN says it of every list of weights that is not its own buffer.
recurrent = pytest.mark.filterwarnings(
    "ignore:RNN module weights are not part of single contiguous chunk"
)

FOUR = {
    "weight": QuantizationScheme(4, granularity="channel"),
    "activation": QuantizationScheme(4, False, signed=False),
}
OBSERVERS = ["min_max", "moving_average", "percentile", "histogram"]


class Attentive(nn.Module):
    """Convolution, BatchNorm, attention over the pixels and a classifier; as `ConvNet`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, toys.CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.relu(self.bn(self.conv(input))).flatten(2).transpose(1, 2)
        hidden = self.block(hidden)
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        return self.fc(hidden.mean(1))


def batches(device: torch.device, *, memory_format: Any = torch.contiguous_format) -> list[Any]:
    return [
        (inputs.to(device, memory_format=memory_format), targets.to(device))
        for inputs, targets in toys.loader(toys.images(), shuffle=False)
    ]


def train(manager: CompressionManager, data: list[Any], *, epochs: int = 2) -> list[float]:
    optimizer = torch.optim.SGD(manager.model.parameters(), 0.02)
    manager.track(optimizer=optimizer)
    return toys.train(manager, data, optimizer, epochs)


def convert_and_serve(manager: CompressionManager, fresh: nn.Module, folder: Path) -> None:
    """Convert with parity on the device, and load the result on the CPU."""
    device = next(manager.model.parameters()).device
    converted = manager.convert()
    assert all(value.device == device for value in converted.state_dict().values())
    manager.save_converted(folder)
    loaded = deploy.load(folder, fresh)
    assert_same_state(converted.state_dict(), loaded.state_dict())
    assert any(not value.is_floating_point() for value in loaded.state_dict().values())
    inputs = toys.images().tensors[0]
    with torch.no_grad(), full_precision():
        assert_close(converted(inputs.to(device)), loaded(inputs))


def assert_close(there: Tensor, here: Tensor) -> None:
    """Compare root mean squares: sums in another order move a few activations by a step."""
    error = (there.cpu() - here).square().mean().sqrt() / here.square().mean().sqrt()
    assert error < 2e-2


@pytest.mark.parametrize("build", [ConvNet, Attentive])
@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
@pytest.mark.parametrize("options", [{}, FOUR], ids=["8 bits", "4 bits"])
def test_training_and_serving(build, learned, options, device, tmp_path):
    model = build().to(device)
    configs = [QATConfig(**options), *([LearnedScaleConfig()] if learned else [])]
    manager = prepare_compression(model, configs)
    losses = train(manager, batches(device), epochs=4)
    assert losses[-1] < losses[0]
    assert all(value.device.type == device.type for value in model.state_dict().values())
    convert_and_serve(manager, build(), tmp_path / "converted")


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_in_training(observer, device, tmp_path):
    model = ConvNet().to(device)
    manager = prepare_compression(model, [QATConfig(), CalibrationConfig(observer=observer)])
    train(manager, batches(device))
    convert_and_serve(manager, ConvNet(), tmp_path / "converted")


@recurrent
@pytest.mark.parametrize("layer", list(matrix.LAYERS))
def test_every_layer_converts_with_parity_and_loads_on_the_cpu(
    layer, device, deterministic, tmp_path
):
    build, inputs = matrix.LAYERS[layer]
    model, inputs = matrix.First(build()).to(device), moved(inputs, device)
    manager = prepare_compression(model, [QATConfig()], example_inputs=inputs)
    model.to(device)  # a model without parameters says not where it will be called
    matrix._train(manager, inputs)
    converted = manager.convert()
    manager.save_converted(tmp_path / "converted")
    loaded = deploy.load(tmp_path / "converted", matrix.First(build()))
    assert_same_state(converted.state_dict(), loaded.state_dict())
    there = deploy.load(tmp_path / "converted", matrix.First(build()).to(device))
    with torch.no_grad():
        assert torch.equal(there(*inputs), converted(*inputs))


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_step_never_waits_for_the_device(learned, observer, device):
    model = Attentive().to(device)
    configs = [QATConfig(), CalibrationConfig(observer=observer)]
    configs += [LearnedScaleConfig()] if learned else []
    manager = prepare_compression(model, configs)
    data = batches(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    manager.track(optimizer=optimizer)
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for step, (inputs, targets) in enumerate(data[:3]):
        manager.on_step_begin(step)
        loss = F.cross_entropy(model(inputs), targets)
        loss = manager.on_after_compute_loss(inputs, None, loss)
        loss.backward()
        manager.on_before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        manager.on_step_end()
    manager.on_step_begin(3)
    # Not the hook of the loss: it looks whether the sum of the terms is finite.
    with no_waiting(device):
        F.cross_entropy(model(data[3][0]), data[3][1]).backward()
        model.eval()
        with torch.no_grad():
            model(data[3][0])


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("build", [ConvNet, Attentive])
def test_post_training_quantization(mode, build, device, tmp_path):
    model = build().to(device).eval()
    options: dict[str, Any] = {"mode": mode}
    if mode == "static":
        # Batches on the CPU are moved to the model.
        options |= {"calibration_data": batches(torch.device("cpu")), "bias_correction": True}
    example = toys.images().tensors[0].to(device)
    manager = prepare_compression(model, [PTQConfig(**options)], example_inputs=example)
    convert_and_serve(manager, build(), tmp_path / "converted")


def test_batch_norm_re_estimation(device):
    data = batches(device)
    configs = [QATConfig(), BatchNormReestimationConfig(dataloader=data)]
    manager = prepare_compression(ConvNet().to(device), configs)
    train(manager, data)
    assert manager.convert()(data[0][0]).isfinite().all()


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
def test_a_prepared_model_moves_before_training(learned, device, tmp_path):
    model = Attentive()
    configs = [QATConfig(), *([LearnedScaleConfig()] if learned else [])]
    manager = prepare_compression(model, configs)
    model.to(device)
    train(manager, batches(device))
    assert all(value.device.type == device.type for value in model.state_dict().values())
    convert_and_serve(manager, Attentive(), tmp_path / "converted")


def test_a_trained_model_moves_to_the_cpu_and_computes_there(device):
    model = ConvNet().to(device)
    manager = prepare_compression(model, [QATConfig()])
    data = batches(device)
    train(manager, data)
    model.eval()
    with torch.no_grad(), full_precision():
        there = model(data[0][0])
        assert_close(there, model.cpu()(data[0][0].cpu()))
    manager.convert(example_inputs=data[0][0].cpu())


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
def test_mixed_precision(learned, device, tmp_path):
    model = Attentive().to(device)
    configs = [QATConfig(), *([LearnedScaleConfig()] if learned else [])]
    manager = prepare_compression(model, configs)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    manager.track(optimizer=optimizer)
    for _ in manager.epochs(2):
        for _, (inputs, targets) in manager.steps(batches(device)):
            with torch.autocast(device.type, torch.bfloat16):
                output = model(inputs)
                assert output.dtype == torch.bfloat16
                loss = F.cross_entropy(output, targets)
            loss = manager.on_after_compute_loss(inputs, output, loss)
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
    for name, buffer in model.named_buffers():
        assert buffer.dtype != torch.bfloat16, name
    convert_and_serve(manager, Attentive(), tmp_path / "converted")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_half_precision(dtype, device):
    model = ConvNet().to(device, dtype)
    manager = prepare_compression(model, [QATConfig()])
    data = [(inputs.to(dtype), targets) for inputs, targets in batches(device)]
    train(manager, data)
    assert manager.convert()(data[0][0]).dtype == dtype


def test_channels_last(device, tmp_path):
    model = ConvNet().to(device, memory_format=torch.channels_last)
    manager = prepare_compression(model, [QATConfig()])
    train(manager, batches(device, memory_format=torch.channels_last))
    convert_and_serve(manager, ConvNet(), tmp_path / "converted")


def test_parity_leaves_the_precision_of_float32_as_it_was(device):
    model = ConvNet().to(device)
    manager = prepare_compression(model, [QATConfig()])
    train(manager, batches(device), epochs=1)
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.allow_tf32
    manager.convert()
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.allow_tf32) == before
