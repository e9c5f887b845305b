"""Both implementations of the passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compression_manager.quantization.integer import bits, parts, rounding
from compression_manager.quantization.integer.native import NativePasses, load_library
from compression_manager.quantization.integer.native.loader import library_path
from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.torch_passes import TorchPasses


@pytest.fixture(scope="session")
def library_file() -> Path:
    """The compiled library, built once and kept where torch keeps extensions."""
    library = load_library()
    if library.functions is None:
        # Nothing can be tested without a compiler, or where the user switched the kernels off.
        pytest.skip(library.reason)
    return library_path()


@pytest.fixture(scope="session", params=["torch", "torch in small parts", "native"])
def passes(request: pytest.FixtureRequest) -> Iterator[Passes]:
    """One implementation after the other; the plain one also as it treats large tensors."""
    if request.param == "native":
        request.getfixturevalue("library_file")
        yield NativePasses()
        return
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "torch in small parts":
            patched.setattr(parts, "_part_of_thread", lambda: 512)
            for module in (bits, rounding):
                patched.setattr(module, "MANY", 1024)
        yield TorchPasses()


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """A number of threads for torch; more than one has each pass split its work."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
