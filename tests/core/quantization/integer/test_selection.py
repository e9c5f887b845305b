"""What a checkpoint says of the arithmetic names all that decides how products round."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compression_manager.quantization.integer import selection
from compression_manager.quantization.integer.cpu_features import CpuFeatures
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.selection import (
    TORCH,
    active_passes,
    arithmetic_in_use,
    prepare_native,
    reference_arithmetic,
    use_passes,
    why_reference,
)
from compression_manager.quantization.integer.torch_passes import TorchPasses
from integer_layers import FastPasses


class OtherPasses(TorchPasses):
    name = "other"


def test_fake_quantization_rounds_alike_everywhere() -> None:
    assert arithmetic_in_use(ProductOptions("fake")) == {"forward": "fake"}


@pytest.mark.parametrize("vnni", [False, True])
def test_native_products_are_named_because_the_rule_asks_for_them(
    vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "cpu_features", lambda: CpuFeatures(vnni=vnni, amx=False))
    used = {}
    for name, passes in (("plain", TORCH), ("native", FastPasses())):
        with use_passes(passes):
            used[name] = arithmetic_in_use(ProductOptions("auto"))
    assert used["plain"] == {
        "forward": "auto", "backward": "float32", "vnni": int(vnni), "amx": 0, "native integers": 0
    }  # fmt: skip
    assert used["native"] == used["plain"] | {"native integers": 1}


def test_bfloat16_products_are_named_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selection, "cpu_features", lambda: CpuFeatures(True, False, bfloat16=True))
    for passes in (TORCH, OtherPasses()):
        with use_passes(passes):
            used = arithmetic_in_use(ProductOptions("auto", "bfloat16"))
        assert (used["backward"], used["bfloat16"]) == ("bfloat16", 1)
        assert used["passes"] == passes.name


def test_native_kernels_compute_where_they_are_ready_and_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library_file: Path
) -> None:
    monkeypatch.setattr(selection, "_native", None)
    assert active_passes() is TORCH
    with monkeypatch.context() as patched:
        patched.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        assert prepare_native(builds=False) == "the native kernels have not been built"
        assert active_passes() is TORCH
    assert prepare_native() is None
    assert active_passes().name == "native"
    with use_passes(TORCH):
        assert active_passes() is TORCH
    monkeypatch.setenv("COMPRESSION_MANAGER_NATIVE", "0")
    assert "turns the native kernels off" in (prepare_native() or "")
    assert active_passes() is TORCH


def test_passes_are_used_until_their_context_ends() -> None:
    outer, inner = OtherPasses(), OtherPasses()
    with use_passes(outer):
        with use_passes(inner):
            assert active_passes() is inner
        assert active_passes() is outer
    assert active_passes() not in (outer, inner)


def test_a_recording_is_one_threads_own() -> None:
    with ThreadPoolExecutor(1) as pool, reference_arithmetic():
        assert why_reference() == "the operations are being recorded"
        assert pool.submit(why_reference).result() is None
        with reference_arithmetic():
            pass
        assert why_reference() == "the operations are being recorded"
    assert why_reference() is None
