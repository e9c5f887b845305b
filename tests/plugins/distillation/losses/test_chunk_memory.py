"""With slices of the vocabulary, memory is bounded by the slices, as the allocator counts it."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from compression_plugins.distillation.losses import (
    token_jensen_shannon_loss,
    token_kl_loss,
    token_reverse_kl_loss,
)

TOKENS = 256
MEBIBYTE = 2**20
LOSSES = [token_kl_loss, token_reverse_kl_loss, token_jensen_shannon_loss]


def peak_bytes(function, folder):
    """Return the most bytes that the function had allocated at once, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    alive = peak = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        alive += change["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


def step_bytes(loss, classes, chunk_size, folder):
    """Return the peak of forward and backward, the student's gradient included."""
    student, teacher = torch.randn(2, TOKENS, classes).unbind()
    student.requires_grad_()
    peak = peak_bytes(lambda: loss(student, teacher, chunk_size=chunk_size).backward(), folder)
    assert student.grad.count_nonzero() > 0
    return peak


def test_the_measure_sees_what_lives_at_once(tmp_path):
    def two_of_three():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(2000, dtype=torch.uint8)
        del first
        return second, torch.empty(500, dtype=torch.uint8)

    assert peak_bytes(two_of_three, tmp_path) == pytest.approx(3000, abs=200)


# The figures of the docstring of `token_kl_loss`; one slice is 1 MiB, the gradient 32 MiB.
@pytest.mark.parametrize(
    ("loss", "chunked", "at_once"), list(zip(LOSSES, (39, 40, 41), (160, 160, 416), strict=True))
)
def test_a_step_holds_a_few_slices_beside_the_gradient(loss, chunked, at_once, tmp_path):
    peak = step_bytes(loss, 32768, 1024, tmp_path) / MEBIBYTE
    assert 33 < peak < chunked + 0.1
    assert step_bytes(loss, 32768, None, tmp_path) / MEBIBYTE == pytest.approx(at_once, rel=0.05)


@pytest.mark.parametrize("loss", LOSSES)
def test_extra_memory_does_not_grow_with_the_vocabulary(loss, tmp_path):
    extra = [
        step_bytes(loss, classes, 128, tmp_path) - TOKENS * classes * 4 for classes in (1024, 8192)
    ]
    assert extra[1] == pytest.approx(extra[0], rel=0.02)
