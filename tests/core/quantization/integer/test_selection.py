"""What a checkpoint says of the arithmetic names all that decides how products round."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from compression_manager.quantization.integer import selection
from compression_manager.quantization.integer.cpu_features import CpuFeatures
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.selection import (
    TORCH,
    arithmetic_in_use,
    reference_arithmetic,
    use_passes,
    why_reference,
)
from integer_layers import FastPasses


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
    with use_passes(TORCH):
        used = arithmetic_in_use(ProductOptions("auto", "bfloat16"))
    assert (used["backward"], used["bfloat16"], used["passes"]) == ("bfloat16", 1, "torch")


def test_a_recording_is_one_threads_own() -> None:
    with ThreadPoolExecutor(1) as pool, reference_arithmetic():
        assert why_reference() == "the operations are being recorded"
        assert pool.submit(why_reference).result() is None
    assert why_reference() is None
