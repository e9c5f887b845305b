"""Every kind of layer with every scheme: trained, converted, saved and loaded again.

The tests run each combination and the reference page shows what came of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager import CompressionError, deploy, prepare_compression
from compression_manager.quantization import (
    QuantizableAdd,
    QuantizableAttention,
    QuantizableMatmul,
    QuantizationScheme,
)
from compression_plugins import QATConfig

EXACT = "yes"
WEIGHT_ONLY = "weight only"


class First(nn.Module):
    """Calls a layer and returns the first of its outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.layer(*inputs)
        return output[0] if isinstance(output, tuple) else output


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _indices(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 10


def _attention() -> nn.Module:
    return nn.MultiheadAttention(8, 2, batch_first=True)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "Linear": (lambda: nn.Linear(40, 5), (_randn(3, 40),)),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3), (_randn(2, 6, 7),)),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3, groups=2), (_randn(2, 6, 5, 5),)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (_randn(2, 2, 3, 3, 3),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 4, 3), (_randn(2, 6, 7),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (_randn(2, 6, 5, 5),)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (_randn(2, 2, 3, 3, 3),)),
    "Embedding": (lambda: nn.Embedding(10, 40), (_indices(2, 4),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(10, 40), (_indices(2, 4),)),
    "MultiheadAttention": (_attention, (_randn(2, 3, 8), _randn(2, 4, 8), _randn(2, 4, 8))),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (_randn(2, 3, 8),),
    ),
    "LSTM": (lambda: nn.LSTM(6, 4, bidirectional=True), (_randn(5, 2, 6),)),
    "GRU": (lambda: nn.GRU(6, 4, 2), (_randn(5, 2, 6),)),
    "RNN": (lambda: nn.RNN(6, 4), (_randn(5, 2, 6),)),
    "QuantizableMatmul": (QuantizableMatmul, (_randn(2, 3, 8), _randn(2, 8, 4))),
    "QuantizableAdd": (QuantizableAdd, (_randn(2, 3, 8), _randn(2, 3, 8).relu())),
    "QuantizableAttention": (
        QuantizableAttention,
        (_randn(2, 1, 3, 8), _randn(2, 1, 4, 8), _randn(2, 1, 4, 8)),
    ),
}

CHANNEL = QuantizationScheme(granularity="channel")
UINT8 = QuantizationScheme(8, False, signed=False)

SCHEMES: dict[str, dict[str, Any]] = {
    "int8 per channel, uint8 input (default)": {},
    "int8 symmetric per tensor": {"weight": QuantizationScheme()},
    "int8 affine per tensor": {"weight": QuantizationScheme(8, False)},
    "uint8 affine per channel": {
        "weight": QuantizationScheme(8, False, "channel", signed=False),
    },
    "int8 full range": {
        "weight": QuantizationScheme(granularity="channel", narrow_range=False),
        "activation": QuantizationScheme(narrow_range=False),
    },
    "int4 per channel": {"weight": QuantizationScheme(4, granularity="channel")},
    "int4 per group of 32": {"weight": QuantizationScheme(4, granularity="group")},
    "int4 affine per group of 5": {
        "weight": QuantizationScheme(4, False, "group", group_size=5),
    },
    "int2 per channel": {"weight": QuantizationScheme(2, granularity="channel")},
    "1 bit": {"weight": QuantizationScheme(1, False, "channel")},
    "4 bits, inputs too": {
        "weight": QuantizationScheme(4, granularity="channel"),
        "activation": QuantizationScheme(4, False, signed=False),
    },
    "16 bits": {
        "weight": QuantizationScheme(16, granularity="channel"),
        "activation": QuantizationScheme(16, False),
    },
    "24 bits": {
        "weight": QuantizationScheme(24, granularity="channel"),
        "activation": QuantizationScheme(24),
    },
    "32 bits": {"weight": QuantizationScheme(32), "activation": QuantizationScheme(32, False)},
    "weight only": {"activation": None},
    "dynamic input per tensor": {
        "activation": QuantizationScheme(8, False, dynamic=True, signed=False),
    },
    "dynamic input per token": {
        "activation": QuantizationScheme(granularity="token", dynamic=True),
    },
}


def run(layer: str, scheme: str, folder: Path) -> str:
    """Train, convert, save and load one combination; return what holds.

    Returns:
        `EXACT`, `WEIGHT_ONLY` (the layer's input stays in float), or `refused: <reason>`.

    Raises:
        AssertionError: the loaded model has other integers, or computes something else.
    """
    build, inputs = LAYERS[layer]
    torch.manual_seed(0)
    model = First(build())
    try:
        manager = prepare_compression(model, [QATConfig(**SCHEMES[scheme])], example_inputs=inputs)
    except CompressionError as error:
        return f"refused: {error}"
    with manager:
        _train(manager, inputs)
        converted = manager.convert()
        manager.save_converted(folder)
        report = manager.report(inputs)
    expected_error = max(report.parity.layer_errors.values(), default=0.0)
    assert expected_error <= 1e-6, f"{layer}, {scheme}: parity error {expected_error}"
    loaded = deploy.load(folder, First(build()))
    saved, own = converted.state_dict(), loaded.state_dict()
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[name], own[name]) for name in saved)
    assert any(not value.is_floating_point() for value in own.values()) or not model.state_dict()
    with torch.no_grad():
        assert torch.equal(converted(*inputs), loaded(*inputs))
    details = [item.detail for item in report.layers if item.quantized]
    assert details
    wants_input = SCHEMES[scheme].get("activation", UINT8) is not None
    return WEIGHT_ONLY if wants_input and all("input float" in x for x in details) else EXACT


def _train(manager: Any, inputs: tuple[Tensor, ...]) -> None:
    parameters = list(manager.model.parameters()) or [nn.Parameter(torch.ones(()))]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    manager.on_train_begin()
    for step in range(3):
        manager.on_step_begin(step)
        output = manager.model(*inputs)
        loss = output.square().mean() * parameters[0].sum() * 0 + output.square().mean()
        loss = manager.on_after_compute_loss(inputs, output, loss)
        loss.backward()
        manager.on_before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        manager.on_step_end()
    manager.on_train_end()
