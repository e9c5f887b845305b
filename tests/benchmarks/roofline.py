"""How fast this machine moves bytes and multiplies, and how much of both a training step takes.

    make bench-roofline

Bandwidth from a copy and a triad of tensors far larger than the caches; peaks from products of
large square matrices, those of integers by the kernel that layers call. The least time of a step is
then its products at the peak of their type plus all other operators' bytes at the bandwidth. What
lies in the caches comes faster than that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from compression_manager.quantization.integer.selection import active_passes, prepare_native
from measuring import machine
from measuring.models import WORKLOADS, Workload
from measuring.report import RESULTS, write_json
from measuring.timing import interleaved
from measuring.trainer import Trainer
from measuring.work import count_work


def peaks(megabytes: int = 256, side: int = 1024, rounds: int = 7) -> dict[str, float]:
    """Return gigabytes, or 10**9 operations, per second: the best round of each measurement.

    The best, because this is about what the machine can do; disturbances only slow it down.
    """
    length = megabytes * 10**6 // 4
    a, b, c = (torch.ones(length) for _ in range(3))
    left, right = torch.randn(side, side), torch.randn(side, side)
    low_left, low_right = left.bfloat16(), right.bfloat16()
    arms: dict[str, tuple[Callable[[], object], float]] = {
        "copy": (lambda: a.copy_(b), 2 * a.nbytes),
        "triad": (lambda: torch.add(b, c, alpha=3.0, out=a), 3 * a.nbytes),
        "float32": (lambda: left @ right, 2 * side**3),
        "bfloat16": (lambda: low_left @ low_right, 2 * side**3),
        "int8": (_integer_product(side), 2 * side**3),
    }
    calls = {name: lambda number, call=call: call() for name, (call, _) in arms.items()}
    durations = interleaved(calls, rounds, warm_up=2, seconds=30, label="peaks")
    return {
        name: amount / min(duration.passed for duration in durations[name]) / 1e9
        for name, (_, amount) in arms.items()
    }


def _integer_product(side: int) -> Callable[[], object]:
    prepare_native()
    passes = active_passes()
    weight = torch.randint(-127, 127, (side, side), dtype=torch.int8)
    if not passes.supports_integers():
        codes = torch.randint(0, 127, (side, side), dtype=torch.int8)
        return lambda: torch._int_mm(codes, weight)
    unsigned, scale = torch.randint(0, 255, (side, side), dtype=torch.uint8), torch.ones(side)
    return lambda: passes.multiply_integers(unsigned, weight, 0, scale, None)


def work_of(workload: Workload) -> dict[str, Any]:
    """Return what the three parts of a float32 step do."""
    trainer = Trainer(workload.build())
    batch = workload.batches[0]
    trainer.step(0, *batch)
    losses: list[torch.Tensor] = []
    forward = count_work(lambda: losses.append(trainer.loss(1, *batch)))
    backward = count_work(losses[0].backward)
    optimizer = count_work(trainer.optimizer.step)
    parts = {"forward": forward, "backward": backward, "optimizer": optimizer}
    return {name: vars(work) for name, work in parts.items()}


def least_milliseconds(
    work: dict[str, dict[str, int]], found: dict[str, float], forward: str, backward: str
) -> dict[str, float]:
    """Return the least time of a step by its limits.

    Args:
        work: what `work_of` returned.
        found: what `peaks` returned.
        forward: type of the forward products: a key of `found`.
        backward: type of the backward products.
    """
    bandwidth = max(found["copy"], found["triad"])
    passes = sum(part["pass_bytes"] for part in work.values())
    return {
        "forward products": work["forward"]["operations"] / found[forward] / 1e6,
        "backward products": work["backward"]["operations"] / found[backward] / 1e6,
        "other operators": passes / bandwidth / 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--megabytes", type=int, default=256, help="of each tensor that is copied")
    parser.add_argument("--side", type=int, default=1024, help="of the matrices")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shrink", type=int, default=1, help="divide the sizes, for a quick look")
    parser.add_argument("--json", type=Path, default=RESULTS / "roofline.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    described = machine.describe_machine()
    print(machine.in_words(described), flush=True)
    found = peaks(options.megabytes, options.side, options.rounds)
    document: dict[str, Any] = {"benchmark": "roofline", "machine": described, "peaks": found}
    print(f"copy {found['copy']:.1f} GB/s, triad {found['triad']:.1f} GB/s")
    for name in ("float32", "bfloat16", "int8"):
        print(f"{name} products: {found[name]:.0f} * 10^9 operations a second", flush=True)
    document["work"] = {}
    for name in options.models:
        work = document["work"][name] = work_of(WORKLOADS[name](options.shrink))
        print(f"\na float32 step of {name}")
        for part, amount in work.items():
            moved = (amount["product_bytes"] + amount["pass_bytes"]) / 1e9
            print(f"  {part}: {amount['operations'] / 1e9:.2f} * 10^9 operations, {moved:.2f} GB")
        least = least_milliseconds(work, found, "float32", "float32")
        shown = ", ".join(f"{part} {value:.1f} ms" for part, value in least.items())
        print(f"  least time: {shown}", flush=True)
    write_json(options.json, document)
    return document


if __name__ == "__main__":
    main()
