"""The kernels of processors that are not this one, as far as this one runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_for_older_processors_pass_the_same_tests(
    capability: str, library_file: Path
) -> None:
    native = [FOLDER / "native" / name for name in ("test_integers.py", "test_multiply.py")]
    tests = [FOLDER / "test_convolutions.py", *native]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=FOLDER.parents[3],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert "skipped" not in finished.stdout.splitlines()[-1]
