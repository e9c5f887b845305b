"""With 2 and 3 bits, learned scales reach a fraction of the loss that observed ranges reach."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toys
from compression_manager import prepare_compression
from compression_manager.quantization import QuantizationScheme
from compression_plugins import LearnedScaleConfig, QATConfig


def _clusters(seed: int) -> tuple[Tensor, Tensor]:
    """Eight classes around random centres in 16 dimensions, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, 16, generator=generator)
    targets = torch.randint(8, (512,), generator=generator)
    inputs = centres[targets] + 0.6 * torch.randn(512, 16, generator=generator)
    inputs[::16] *= 4.0
    return inputs, targets


def _final_loss(bits: int, seed: int, *, learned: bool) -> float:
    inputs, targets = _clusters(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for rows in [*torch.arange(512).split(64)] * 5:
        F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    config = QATConfig(
        weight=QuantizationScheme(bits=bits, granularity="channel"),
        activation=QuantizationScheme(bits=bits, symmetric=False, signed=False),
    )
    manager = prepare_compression(model, [config, *([LearnedScaleConfig()] if learned else [])])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    manager.track(optimizer=optimizer)
    batches = [(inputs[rows], targets[rows]) for rows in torch.arange(512).split(64)]
    toys.train(manager, batches, optimizer, 5)
    converted = manager.convert(inputs[:64])
    with torch.no_grad():
        return float(F.cross_entropy(converted(inputs), targets))


@pytest.mark.parametrize("bits", [2, 3])
def test_learned_scales_beat_observed_ranges_at_equal_bits(bits):
    seeds = range(3)
    observed = [_final_loss(bits, seed, learned=False) for seed in seeds]
    learned = [_final_loss(bits, seed, learned=True) for seed in seeds]
    assert sum(learned) < 0.5 * sum(observed)
