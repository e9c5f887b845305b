"""Random states."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from compression_manager.errors import CheckpointMismatchError
from compression_manager.state import (
    capture_random_state,
    read_checkpoint,
    restore_random_state,
    write_checkpoint,
)


@pytest.fixture(autouse=True)
def untouched():
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(state[0]), np.random.set_state(state[1]), torch.set_rng_state(state[2])


def draw():
    values = [random.random(), random.gauss(), np.random.rand(), np.random.randn()]
    values += [torch.rand(()).item(), torch.randn(5).sum().item()]
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            values.append(torch.rand((), device=f"cuda:{device}").item())
    return values


def test_all_generators_continue_after_a_file(tmp_path):
    draw()  # leaves the second half of a pair of Gaussian numbers pending
    write_checkpoint(tmp_path / "c", {"random": capture_random_state()})
    expected = [draw() for _ in range(3)]
    restore_random_state(read_checkpoint(tmp_path / "c")["random"])
    assert [draw() for _ in range(3)] == expected


def test_capturing_draws_nothing():
    state = capture_random_state()
    capture_random_state()
    expected = draw()
    restore_random_state(state)
    assert draw() == expected


def test_numpy_is_left_out_where_nobody_imported_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy")
    assert "numpy" not in capture_random_state()


def test_numpy_is_restored_in_a_process_that_imports_it_later(tmp_path):
    write_checkpoint(tmp_path / "c", {"random": capture_random_state()})
    expected = np.random.rand()
    code = f"""
from compression_manager.state import read_checkpoint, restore_random_state
restore_random_state(read_checkpoint({str(tmp_path / "c")!r})["random"])
import numpy
print(repr(float(numpy.random.rand())))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(run.stdout) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"python": (3, (1, 2), None)},
        {"python": None},
        {"torch": torch.zeros(3, dtype=torch.uint8)},
        {"torch": None},
        {"numpy": {"bit_generator": "other"}},
        {"numpy": 3},
    ],
    ids=str,
)
def test_unfit_state_changes_nothing(change):
    state = {**capture_random_state(), **change}
    draw()
    before = capture_random_state()
    expected = draw()
    restore_random_state(before)
    with pytest.raises(CheckpointMismatchError, match="random state"):
        restore_random_state(state)
    assert draw() == expected


def test_missing_part_is_refused():
    with pytest.raises(CheckpointMismatchError):
        restore_random_state({})
