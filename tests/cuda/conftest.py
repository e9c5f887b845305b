"""On a GPU everything computes what it does on the CPU; without one the folder is skipped.

`pytest tests/cuda --device cpu` rehearses the tests where there is no GPU: mistakes in the tests
show, but nothing is proven.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# cuBLAS reads it when it is first used, and is deterministic only with it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="what to run tests/cuda on (cuda or cpu)")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test."""
    # Unknown when the whole suite runs, because only initial conftests may add options.
    chosen = torch.device(request.config.getoption("--device", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return chosen


@pytest.fixture(autouse=True)
def _seed(device: torch.device) -> None:
    """Skip every test of the folder without a GPU; otherwise seed it."""
    torch.manual_seed(0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Let torch refuse operations without a deterministic kernel."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
