"""Where the time of a training step goes: products, quantization, other operators, Python.

    make bench-profile

The parts are those of torch's profiler, which makes every operator and every Python call somewhat
slower: compare the parts with one another, and the ratios with `training_step.py`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from compression_manager.quantization.integer.selection import active_passes
from measuring import machine
from measuring.command import model_parser
from measuring.kernel_parts import FLOAT_PRODUCTS, INTEGERS, marked, part_of_pass
from measuring.models import WORKLOADS, Workload
from measuring.report import row, write_json
from measuring.variants import FLOAT, VARIANTS, Unavailable, Variant, VariantTrainer, warm_cache

PARTS = ("products", "quantization", "other operators", "Python")
WIDTHS = (24, 8, 10, 14, 17, 8)
MEASURED = ("fake", "auto-torch", "auto-native", "bfloat16x3", "bfloat16")
WARM_UP = 4

_PRODUCTS = (*FLOAT_PRODUCTS, "aten::_int_mm", "onednn::")


def part_of(event: Any) -> str | None:
    """Return what an event's own time belongs to; None for what is Python's.

    Args:
        event: of torch's profiler, with its name and its parent.
    """
    part = part_of_pass(event)
    if part is not None:
        return "products" if part == INTEGERS else "quantization"
    if event.name.startswith(_PRODUCTS):
        return "products"
    if event.name == "aten::aminmax":
        return "quantization"
    return "other operators" if event.name.startswith(("aten::", "onednn::")) else None


def measure(
    workload: Workload, variants: Sequence[Variant], steps: int
) -> dict[str, dict[str, float]]:
    """Return variant -> milliseconds of a step: all, and each of `PARTS`."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = warm_cache(workload, Path(folder) / "cache")
        for variant in variants:
            try:
                trainer = VariantTrainer(variant, workload, cache)
            except Unavailable:
                continue
            found[variant.name] = _profiled(trainer, steps)
    return found


def _profiled(trainer: VariantTrainer, steps: int) -> dict[str, float]:
    for number in range(WARM_UP):
        trainer.step(number)
    with trainer.using():
        passes = active_passes()
    with marked(passes), profile(activities=[ProfilerActivity.CPU]) as recorded:
        began = time.perf_counter()
        for number in range(WARM_UP, WARM_UP + steps):
            trainer.step(number)
        passed = 1e3 * (time.perf_counter() - began) / steps
    parts = dict.fromkeys(PARTS, 0.0)
    for event in recorded.events():
        part = part_of(event)
        if part is not None:
            parts[part] += event.self_cpu_time_total / 1e3 / steps
    parts["Python"] = passed - sum(parts.values())
    return {"all": passed, **parts}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; return what was measured."""
    parser = model_parser(__doc__, "step_profile")
    parser.add_argument("--steps", type=int, default=5, help="that are profiled")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    described = machine.describe_machine()
    document: dict[str, Any] = {"benchmark": "step_profile", "machine": described, "results": []}
    print(machine.in_words(described), flush=True)
    variants = [FLOAT, *(variant for variant in VARIANTS if variant.name in MEASURED)]
    titles = {variant.name: variant.title for variant in variants}
    for name in options.models:
        workload = WORKLOADS[name](options.shrink)
        print(f"\n{name}, milliseconds of a step\n{row(['', 'all', *PARTS], WIDTHS)}", flush=True)
        for variant, parts in measure(workload, variants, options.steps).items():
            shown = [f"{value:.1f}" for value in parts.values()]
            print(row([titles[variant], *shown], WIDTHS), flush=True)
            document["results"].append(
                {"model": name, "variant": variant, "title": titles[variant], "parts": parts}
            )
    write_json(options.json, document)
    return document


if __name__ == "__main__":
    main()
