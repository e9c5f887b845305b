"""The native passes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from compression_manager.quantization.integer.native import NativePasses


@pytest.fixture(scope="session")
def passes(library_file: Path) -> NativePasses:
    return NativePasses()


@pytest.fixture
def convolution_gradients(passes: NativePasses) -> None:
    """Leave out a test of kernels that are made of AMX's instructions; torch computes elsewhere."""
    if not passes.supports_convolution_gradients():
        pytest.skip("no AMX")  # nothing calls them then, and without AVX-512 BF16 they cannot run
