"""The report's names of kernels are those of what is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compression_manager.quantization.integer import products, torch_passes
from compression_manager.quantization.integer.cpu_features import CpuFeatures
from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.integer.operands import IntegerInput, IntegerWeight
from compression_manager.quantization.integer.selection import TORCH
from integer_layers import FastPasses

CPU = torch.device("cpu")
GEOMETRY = Geometry((1, 1), (0, 0), (1, 1), 1)
EXACT = "float32 products, summed exactly"


class Recorded(TorchDispatchMode):
    """Remembers the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def _operands(*shape: int) -> tuple[IntegerInput, IntegerWeight]:
    codes = torch.randint(128, (3, 8, *shape), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (4, 8, *[1] * len(shape)), dtype=torch.int8)
    scale, zero_point = torch.tensor(0.5), torch.tensor(7, dtype=torch.int32)
    return IntegerInput(codes, scale, zero_point, None), IntegerWeight(weight, torch.ones(4), None)


@pytest.fixture(params=[False, True], ids=["without VNNI", "with VNNI"])
def vnni(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    _pretend(monkeypatch, CpuFeatures(vnni=request.param, amx=False))
    return bool(request.param)


def _pretend(monkeypatch: pytest.MonkeyPatch, features: CpuFeatures) -> None:
    for module in (products, torch_passes):
        monkeypatch.setattr(module, "cpu_features", lambda: features)


@pytest.mark.parametrize("packs", [False, True])
def test_of_linear_layers(vnni: bool, packs: bool) -> None:
    with Recorded() as recorded:
        products.linear(*_operands(), None, TORCH, packs=packs)
    kernel = products.linear_kernel(CPU, TORCH, packs=packs).partition(" (")[0]
    if not vnni:
        assert kernel == EXACT
        assert "aten.mm" in recorded.names
        assert not any("_int" in name or "onednn" in name for name in recorded.names)
        return
    assert kernel == ("onednn.qlinear_pointwise" if packs else "torch._int_mm")
    assert kernel.replace("torch.", "aten.") in recorded.names


@pytest.mark.parametrize("packs", [False, True])
def test_of_convolutions(vnni: bool, packs: bool) -> None:
    with Recorded() as recorded:
        products.convolve(*_operands(5, 5), None, GEOMETRY, TORCH, packs=packs)
    kernel = products.convolution_kernel(TORCH, 1, packs=packs).partition(" (")[0]
    if vnni:
        assert kernel == "onednn.qconv_pointwise"
        assert kernel in recorded.names
    else:
        assert kernel == EXACT
        assert "aten.convolution" in recorded.names


class Fast(FastPasses):
    """Those, with a name, which remember that they were asked to convolve."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def integer_kernel(self, device: torch.device) -> str:
        return f"fast on {device}"

    def convolve_integers(self, *arguments: Any) -> Tensor:
        self.asked.append("convolve_integers")
        return super().convolve_integers(*arguments)


def test_passes_that_multiply_fast_name_their_own_kernel() -> None:
    assert products.linear_kernel(CPU, Fast(), packs=False) == "fast on cpu"
    cuda = products.linear_kernel(torch.device("cuda"), TORCH, packs=False)
    assert cuda.partition(" (")[0] == "torch._int_mm"


@pytest.mark.parametrize("packs", [False, True])
def test_passes_that_multiply_fast_convolve_in_training(vnni: bool, packs: bool) -> None:
    fast, by_onednn = Fast(), vnni and packs
    kernel = products.convolution_kernel(fast, 1, packs=packs)
    assert (kernel == "fast on cpu") != by_onednn
    products.convolve(*_operands(5, 5), None, GEOMETRY, fast, packs=packs)
    assert fast.asked == ([] if by_onednn else ["convolve_integers"])


def test_passes_that_multiply_fast_leave_groups_to_others(vnni: bool) -> None:
    kernel = products.convolution_kernel(Fast(), 2, packs=False)
    assert kernel.partition(" (")[0] == ("onednn.qconv_pointwise" if vnni else EXACT)
