"""The path of a product follows from shapes, dtypes and the machine alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization.integer.cpu_features import CpuFeatures
from compression_manager.quantization.integer.geometry import Size
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.passes import MAX_SUMMED, Passes
from compression_manager.quantization.integer.rule import backward_of, decide, why_no_integers
from compression_manager.quantization.integer.selection import TORCH
from integer_layers import FastPasses, pretended

LARGE = Size(rows=512, summed=512, columns=512)
CPU = torch.device("cpu")


class Labelled(Tensor):
    """May compute in a way of its own."""


def _reason(
    monkeypatch: Any,
    size: Size,
    *,
    vnni: bool = True,
    passes: Passes = TORCH,
    forward: Any = "auto",
    training: bool = True,
) -> str | None:
    with pretended(monkeypatch, vnni=vnni, amx=False):
        return why_no_integers(ProductOptions(forward), CPU, size, passes, training)


def test_large_products_are_integer_where_the_cpu_has_the_instructions(monkeypatch: Any) -> None:
    assert _reason(monkeypatch, LARGE) is None
    reason = "the torch kernels need VNNI to gain; this CPU has neither VNNI nor AMX"
    assert _reason(monkeypatch, LARGE, vnni=False) == reason


@pytest.mark.parametrize("vnni", [False, True])
def test_native_kernels_gain_in_smaller_layers(monkeypatch: Any, vnni: bool) -> None:
    few = "1,044,480 multiplications are too few to gain; 1,048,576 are needed"
    for rows, reason in ((256, None), (255, few)):
        size = Size(rows, 64, 64)
        assert _reason(monkeypatch, size, vnni=vnni, passes=FastPasses()) == reason
    assert _reason(monkeypatch, Size(64, 512, 512)) is None
    assert "16,777,216 are needed" in (_reason(monkeypatch, Size(63, 512, 512)) or "")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (
            LARGE.__class__(63, 512, 512),
            "16,515,072 multiplications are too few to gain; 16,777,216 are needed",
        ),
        (LARGE.__class__(1024, 63, 512), "63 products in a sum are too few to gain; 64 are needed"),
        (LARGE.__class__(4096, 512, 15), "15 output channels are too few to gain; 16 are needed"),
        (LARGE.__class__(512, 512, 512, 2), "2 groups of channels leave little to multiply"),
    ],
)
def test_small_products_are_not_in_training(monkeypatch: Any, size: Size, reason: str) -> None:
    assert _reason(monkeypatch, size) == reason
    assert _reason(monkeypatch, size, forward="integer") is None


@pytest.mark.parametrize("vnni", [False, True])
def test_all_products_are_integer_in_evaluation_but_groups(monkeypatch: Any, vnni: bool) -> None:
    for size in (Size(1, 27, 10), LARGE):
        assert _reason(monkeypatch, size, vnni=vnni, training=False) is None
    groups = _reason(monkeypatch, Size(512, 9, 64, 64), vnni=vnni, training=False)
    assert groups == "64 groups of channels leave little to multiply"


def test_sums_must_fit_into_32_bits(monkeypatch: Any) -> None:
    fits, overflows = Size(512, MAX_SUMMED, 64), Size(512, MAX_SUMMED + 1, 64)
    assert 255 * 128 * MAX_SUMMED < 2**31 <= 255 * 128 * (MAX_SUMMED + 1)
    assert _reason(monkeypatch, fits, forward="integer") is None
    assert "32-bit sums" in (_reason(monkeypatch, overflows, forward="integer") or "")


def test_cuda_multiplies_matrices_of_certain_sizes() -> None:
    device, options = torch.device("cuda"), ProductOptions("integer")
    assert why_no_integers(options, device, LARGE, TORCH, True) is None
    assert why_no_integers(options, device, Size(17, 512, 512), TORCH, True) is None
    assert "17 rows" in (why_no_integers(options, device, Size(16, 512, 512), TORCH, True) or "")
    for size in (Size(512, 500, 512), Size(512, 512, 500)):
        reason = why_no_integers(options, device, size, TORCH, True)
        assert "multiples of 8" in (reason or "")


def test_cuda_multiplies_integers_only_if_it_is_told_to() -> None:
    reason = why_no_integers(ProductOptions("auto"), torch.device("cuda"), LARGE, TORCH, True)
    assert reason == 'on CUDA integers are multiplied with forward="integer" only'


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda input, weight: (input.double(), weight), "torch.float64"),
        (lambda input, weight: (input, weight.bfloat16()), "torch.bfloat16"),
        (lambda input, weight: (input[:0], weight), "empty"),
        (lambda input, weight: (input.as_subclass(Labelled), weight), "on Labelled"),
        (lambda input, weight: (input, weight.as_subclass(Labelled)), "on Labelled"),
        (lambda input, weight: (input.to("meta"), weight), "on meta"),
        (lambda input, weight: (nn.Buffer(input), weight), None),
    ],
)
def test_other_tensors_take_fake_quantization(change: Any, reason: str | None) -> None:
    input, weight = change(torch.randn(4, 8), torch.randn(3, 8))
    options, size = ProductOptions("integer"), Size(4, 8, 3)
    decision = decide(options, input, weight, size, TORCH, training=True)
    assert decision.path == ("integer" if reason is None else "fake")
    assert (reason or "") in decision.reason


def test_autocast_chooses_by_itself() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        decision = decide(
            ProductOptions("integer"),
            torch.randn(4, 8),
            torch.randn(3, 8),
            Size(4, 8, 3),
            TORCH,
            training=True,
        )
    assert (decision.path, decision.reason) == (
        "fake", "autocast chooses the type of the products"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "amx", "bfloat16", "used"),
    [
        ("bfloat16", True, False, "bfloat16"),
        ("bfloat16", False, True, "bfloat16"),
        ("bfloat16", False, False, "float32"),
        ("bfloat16x3", True, True, "bfloat16x3"),
        ("float32", True, True, "float32"),
    ],
)
def test_bfloat16_is_used_where_it_is_faster(
    monkeypatch: Any, chosen: Any, amx: bool, bfloat16: bool, used: str
) -> None:
    class AnyPieces(FastPasses):
        def supports_pieces(self, pieces: int) -> bool:
            return True

    options = ProductOptions("auto", chosen)
    with pretended(monkeypatch, vnni=True, amx=amx, bfloat16=bfloat16):
        assert backward_of(options, CPU, AnyPieces()) == used
        # As those are that have AVX-512's products only.
        assert backward_of(options, CPU, TORCH) == (used if used != "bfloat16x3" else "float32")
        assert backward_of(options, torch.device("cuda"), AnyPieces()) == "float32"


def test_features_read_as_words() -> None:
    assert str(CpuFeatures(vnni=True, amx=False)) == "VNNI"
    assert str(CpuFeatures(vnni=True, amx=True)) == "VNNI and AMX"
