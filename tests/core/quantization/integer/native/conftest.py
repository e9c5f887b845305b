"""The native passes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from compression_manager.quantization.integer.native import NativePasses


@pytest.fixture(scope="session")
def passes(library_file: Path) -> NativePasses:
    return NativePasses()
