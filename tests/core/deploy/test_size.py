"""Deployed models take the bytes of their integers, and no float copy of a weight is left."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from compression_manager import deploy
from compression_manager.deploy import ConvertedLayer
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.integer import scratch
from quantization_reference import trained
from toy_transformers import Conv1D


class ConvNet(nn.Module):
    """Convolutions that absorb BatchNorm, one that has none, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 48, 3, groups=2), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Conv2d(48, 40, 3), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(40 * 4 * 4, 30)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


class Language(nn.Module):
    """Transformer blocks between an embedding and the output layer that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(150, 48)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(48, 4, 144, batch_first=True, dropout=0.0) for _ in range(2)
        )
        self.memory = nn.GRU(48, 60, batch_first=True)
        self.reduce = Conv1D(48, 60)
        self.head = nn.Linear(48, 150, bias=False)
        self.head.weight = self.words.weight

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.words(indices)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.reduce(self.memory(hidden)[0]))
        return logits


class First(nn.Module):
    """Calls a layer and returns the first of its outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.layer(*inputs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def indices(*shape: int) -> Tensor:
    return torch.randint(100, shape, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "Linear": (lambda: nn.Linear(200, 70), randn(3, 200)),
    "Conv1d": (lambda: nn.Conv1d(40, 50, 5), randn(2, 40, 9)),
    "Conv2d": (lambda: nn.Conv2d(40, 30, 3, groups=2), randn(2, 40, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(20, 30, 3), randn(2, 20, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(40, 50, 5), randn(2, 40, 9)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(40, 30, 3, groups=2), randn(2, 40, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(20, 30, 3), randn(2, 20, 4, 4, 4)),
    "Embedding": (lambda: nn.Embedding(100, 130), indices(3, 5)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(100, 130), indices(3, 5)),
    "Conv1D": (lambda: Conv1D(150, 90), randn(3, 90)),
    "attention": (
        lambda: First(nn.MultiheadAttention(96, 4, batch_first=True)),
        (randn(2, 5, 96), randn(2, 5, 96), randn(2, 5, 96)),
    ),
    "LSTM": (lambda: First(nn.LSTM(90, 70, 2, bidirectional=True)), randn(4, 2, 90)),
    "GRU": (lambda: First(nn.GRU(90, 70)), randn(4, 2, 90)),
    "RNN": (lambda: First(nn.RNN(150, 130)), randn(4, 2, 150)),
    "convolutional network": (ConvNet, randn(4, 3, 10, 10)),
    "language model": (Language, indices(3, 5)),
}
SCHEMES = {
    "int8 per channel": QuantizationScheme(granularity="channel"),
    "uint8 affine": QuantizationScheme(8, False, signed=False),
    "int4 per channel": QuantizationScheme(4, granularity="channel"),
    "int4 in groups": QuantizationScheme(4, granularity="group", group_size=32),
    "int3 affine in groups": QuantizationScheme(3, False, "group", group_size=16),
    "int6 affine per channel": QuantizationScheme(6, False, "channel"),
    "int2 per tensor": QuantizationScheme(2),
    "1 bit per channel": QuantizationScheme(1, False, "channel"),
    "int16 per channel": QuantizationScheme(16, granularity="channel"),
}
every_model = pytest.mark.parametrize("model_name", MODELS)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def weights_of(model: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """The parameters of at least two dimensions with their modules, each once.

    All of them are quantized in the models above.
    """
    found = {
        id(parameter): (module, parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1
    }
    return list(found.values())


def number_of_scales(module: nn.Module, weight: Tensor, scheme: QuantizationScheme) -> int:
    outputs, values = weight.shape[0], weight.numel()
    if "Transpose" in type(module).__name__:
        outputs = weight.shape[1] * module.groups  # type: ignore[operator]
    elif type(module).__name__ == "Conv1D":
        outputs = weight.shape[1]
    if scheme.granularity == "tensor":
        # Attention has three matrices in one parameter.
        return 3 if isinstance(module, nn.MultiheadAttention) else 1
    return outputs * (math.ceil(values / outputs / scheme.group_size) if scheme.group_size else 1)


def ideal_bytes(model: nn.Module, converted: nn.Module, scheme: QuantizationScheme) -> float:
    """Bits of the integers, scales, zero points, and what stays in floating point.

    Args:
        model: a fresh float model.
        converted: tells how many inputs have a stored range.
    """
    total = 0.0
    for module, weight in weights_of(model):
        scales = number_of_scales(module, weight, scheme)
        zero_point_bytes = 0 if scheme.symmetric else math.ceil(scheme.bits / 8)
        total += scheme.bits * weight.numel() / 8 + scales * (4 + zero_point_bytes)
    weights = {id(weight) for _, weight in weights_of(model)}
    folds = scheme.symmetric and scheme.axis == 0
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and folds:
            assert isinstance(converted.get_submodule(name), nn.Identity)
            continue
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        total += sum(tensor.nbytes for tensor in own if id(tensor) not in weights)
        if isinstance(module, nn.Conv2d) and module.bias is None and folds:
            total += 4 * module.out_channels  # the BatchNorm's
    state = converted.state_dict()
    return total + sum(value.nbytes for key, value in state.items() if "input_" in key)


def distinct_bytes(state: dict[str, Tensor]) -> int:
    return sum({value.data_ptr(): value.nbytes for value in state.values()}.values())


@every_scheme
@every_model
def test_bytes_are_within_two_percent_of_the_ideal(
    model_name: str, scheme: QuantizationScheme, tmp_path: Path
) -> None:
    build, inputs = MODELS[model_name]
    torch.manual_seed(0)
    manager = trained(build(), inputs, steps=2, weight=scheme)
    converted = manager.convert()
    ideal = ideal_bytes(build(), converted, scheme)
    manager.save_converted(tmp_path / "model")
    saved = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    loaded = deploy.load(tmp_path / "model", build())
    sizes = {
        "saved": sum(value.nbytes for value in saved.values()),
        "converted": distinct_bytes(converted.state_dict()),
        "loaded": distinct_bytes(loaded.state_dict()),
        "reported": manager.report().bytes_after,
    }
    assert len(set(sizes.values())) == 1, sizes
    assert ideal <= sizes["saved"] <= 1.02 * ideal
    for candidate in (converted, loaded):
        for tensor in candidate.state_dict().values():
            # Nothing larger is kept alive behind a view.
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.fixture
def appeared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[set[int]], list[Tensor]]]:
    """Returns the float tensors with one of these numbers of elements that the test has made."""
    # What the layers of all models write to, one after the other, belongs to none of them.
    monkeypatch.setattr(scratch, "_LARGEST", 0)
    gc.freeze()  # what other tests left is neither listed nor searched for garbage

    def find(sizes: set[int]) -> list[Tensor]:
        gc.collect()
        return [
            item
            for item in gc.get_objects()
            if issubclass(type(item), Tensor)
            and item.is_floating_point()
            and not item.is_meta
            and item.numel() in sizes
        ]

    yield find
    gc.unfreeze()


def sizes_of(model: nn.Module) -> set[int]:
    """Numbers of elements of the weights, and of their parts in attention."""
    sizes = set()
    for module, weight in weights_of(model):
        sizes |= {weight.numel()}
        sizes |= {weight.numel() // 3} if isinstance(module, nn.MultiheadAttention) else set()
    others = [
        tensor.numel() for tensor in (*model.parameters(), *model.buffers()) if tensor.dim() < 2
    ]
    assert sizes.isdisjoint(others)
    return sizes


@pytest.mark.parametrize("bits", [4, 8])
@every_model
def test_no_float_copy_of_a_weight_is_left(
    model_name: str, bits: int, appeared: Callable[[set[int]], list[Tensor]], tmp_path: Path
) -> None:
    build, inputs = MODELS[model_name]
    torch.manual_seed(0)
    model = build()
    sizes = sizes_of(model)
    scheme = QuantizationScheme(bits, granularity="channel")
    manager = trained(model, inputs, steps=2, weight=scheme)
    for parameter in model.parameters():
        parameter.grad = None
    converted = manager.convert()
    manager.save_converted(tmp_path / "model")
    own = {id(parameter) for parameter in model.parameters()}
    assert [tensor.shape for tensor in appeared(sizes) if id(tensor) not in own] == []

    manager.close()
    del manager, model, parameter
    loaded = deploy.load(tmp_path / "model", build())
    assert appeared(sizes) == []
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        assert torch.equal(converted(*arguments), loaded(*arguments))
    assert appeared(sizes) == []
    assert any(isinstance(module, ConvertedLayer) for module in loaded.modules())
