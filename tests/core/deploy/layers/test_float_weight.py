"""A deployed layer's `weight` answers as the float layer's, and costs nothing until it is read."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager import QuantizationError, deploy
from compression_manager.deploy.layers.kinds import CONVERTED_CLASSES
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.storage import WeightFormat
from quantization_reference import trained
from toy_transformers import Conv1D

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Patches(nn.Module):
    """Brings its inputs to dtype and device of a weight, as vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.projection(images.to(self.projection.weight.dtype))
        pooled = patches.flatten(2).mean(-1).to(self.head.weight.device)
        logits: Tensor = self.head(pooled)
        return logits


class UsesWeight(Patches):
    """Computes with a weight by itself."""

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(super().forward(images), self.head.weight.t()) + self.head.weight.mean()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("build", [Patches, UsesWeight])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_reads_a_weight_is_deployed(
    build: type[Patches], bits: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    scheme = QuantizationScheme(bits, granularity="channel")
    manager = trained(Patches(), IMAGES, weight=scheme)
    converted = manager.convert(example_inputs=IMAGES)
    manager.save_converted(tmp_path / "saved")
    converted.__class__ = build
    loaded = deploy.load(tmp_path / "saved", build())
    assert torch.equal(loaded(IMAGES), converted(IMAGES))
    deploy.export(converted, tmp_path / "model.onnx", "onnx", IMAGES)
    deploy.export(converted, tmp_path / "model.pt2", "torch", IMAGES)
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), converted(IMAGES))


def test_files_hold_no_float_copy_of_a_weight_that_is_asked_for_its_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    converted = trained(Patches(), IMAGES).convert()
    deploy.export(converted, tmp_path / "model.onnx", "onnx", IMAGES)
    tensors = onnx.load(tmp_path / "model.onnx").graph.initializer
    floats = {item.name for item in tensors if item.data_type == onnx.TensorProto.FLOAT}
    assert all(len(item.dims) < 2 for item in tensors if item.name in floats)
    deploy.export(converted, tmp_path / "model.pt2", "torch", IMAGES)
    program = torch.export.load(tmp_path / "model.pt2")
    held = [*program.state_dict.values(), *program.constants.values()]
    assert not [item for item in held if item.is_floating_point() and item.dim() > 1]
    decoded = [node for node in program.graph.nodes if node.name.startswith("conv2d")]
    assert len(decoded) == 1
    reads = next(node for node in program.graph.nodes if node.target == "b_projection_weight")
    casts = [node for node in reads.users if node.target is torch.ops.aten.to.dtype]
    assert len(casts) == 1  # for the convolution alone


def test_what_describes_a_weight_does_not_dequantize_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = trained(nn.Linear(6, 4), randn(3, 6)).convert()

    def fail(*_: object) -> Tensor:
        raise AssertionError("dequantized")

    monkeypatch.setattr(WeightFormat, "decode", fail)
    weight = layer.weight
    assert (weight.dtype, weight.device.type, weight.shape) == (torch.float32, "cpu", (4, 6))
    assert weight.is_floating_point()
    assert (weight.dim(), weight.size(0)) == (2, 4)


@pytest.mark.parametrize(
    ("float_layer", "input"),
    [
        (nn.Linear(6, 4), randn(3, 6)),
        (nn.Conv2d(4, 6, 3, groups=2), randn(2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), randn(2, 4, 5, 5)),
        (Conv1D(4, 6), randn(3, 6)),
        (nn.Embedding(9, 4), torch.tensor([1, 2])),
    ],
    ids=lambda item: type(item).__name__,
)
def test_the_weight_has_the_float_layers_form(float_layer: nn.Module, input: Tensor) -> None:
    torch.manual_seed(0)
    original = copy.deepcopy(float_layer)
    layer = trained(copy.deepcopy(float_layer), input, steps=2).convert()
    assert layer.weight.shape == original.weight.shape
    torch.testing.assert_close(layer.weight * 1, original.weight.data, rtol=0, atol=0.05)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again.weight, copy.deepcopy(layer).weight)
    assert layer.weight.numpy().shape == tuple(original.weight.shape)
    assert "weight" in dict(layer.named_buffers())


def test_a_float_weight_cannot_be_set() -> None:
    torch.manual_seed(0)
    layer = trained(nn.Linear(6, 4), randn(3, 6)).convert()
    with pytest.raises(QuantizationError, match="deployed Linear is stored as integers"):
        layer.weight = torch.zeros(4, 6)
    layer.weight = layer.integer_weight().clone()
    assert layer.integer_weight().dtype == torch.int8


def test_a_layer_of_several_parts_has_no_weight() -> None:
    torch.manual_seed(0)
    layer = trained(nn.LSTM(4, 3), randn(2, 3, 4)).convert()
    assert isinstance(layer, CONVERTED_CLASSES["LSTM"])
    with pytest.raises(AttributeError, match="'ConvertedRecurrent' object has no attribute"):
        _ = layer.weight
