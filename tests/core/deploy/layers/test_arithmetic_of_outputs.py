"""What runs in a model's place may have either of its arithmetics, and no third one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compression_manager.deploy.reference import Reference
from compression_manager.errors import ParityError
from compression_manager.quantization.integer.selection import reference_arithmetic, why_reference
from quantization_reference import trained

INPUTS = torch.linspace(-1.0, 1.0, 60).reshape(10, 6)


class Doubling(nn.Module):
    """Returns other outputs where the functions of `arithmetic` compute, far beyond rounding."""

    def __init__(self, converted: nn.Module) -> None:
        super().__init__()
        self.converted = converted

    def forward(self, input: Tensor) -> Tensor:
        return self.converted(input) * (2.0 if why_reference() else 1.0)


def test_a_run_is_compared_in_its_own_arithmetic() -> None:
    torch.manual_seed(0)
    manager = trained(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), INPUTS)
    model = Doubling(manager.convert())
    reference = Reference.of(model, INPUTS)
    on_integers = model(INPUTS).detach()
    with reference_arithmetic():
        in_float32 = model(INPUTS).detach()
    assert not torch.allclose(on_integers, in_float32)
    for output in (on_integers, in_float32):
        assert reference.compare(lambda input, output=output: output, 1e-6, "the copy") == 0
    with pytest.raises(ParityError, match="returns other outputs"):
        reference.compare(lambda input: on_integers * 1.5, 1e-2, "the copy")
