"""Killed at random moments, a writer never leaves an unloadable newest checkpoint."""

import subprocess
import sys

import pytest

# A child of a process that has torch loaded already starts in milliseconds.
DRIVER = """
import os, random, signal, sys, time
import torch
from compression_manager.state import find_checkpoint, read_checkpoint, write_checkpoint

root, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)


def save(step):
    # Every second one replaces the checkpoint of the step before.
    path = f"{root}/step-{step // 2:08d}"
    state = {"step": step, "w": torch.full((20_000,), float(step))}
    write_checkpoint(path, state, {"global_step": step // 2})


rng = random.Random(0)
save(0)
step, lost = 1, 0
for _ in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            save(step)
            step += 1
    time.sleep(rng.uniform(0.002, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        state = read_checkpoint(find_checkpoint(root))
        assert state["step"] >= step - 1, (state["step"], step)
        assert torch.equal(state["w"], torch.full((20_000,), float(state["step"])))
        step = state["step"] + 1
    except Exception as error:
        lost += 1
        print(repr(error), file=sys.stderr)
        step += 1
save(step)
hidden = [name for name in os.listdir(root) if name.startswith(".")]
print(lost, len(hidden), step)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_newest_checkpoint_is_loadable_after_every_kill(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path), "60"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    lost, hidden, steps = map(int, result.stdout.split())
    assert steps > 5, "the writer must get somewhere between the kills"
    assert lost == 0, result.stderr
    assert hidden == 0
