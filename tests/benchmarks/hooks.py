"""What the framework itself costs: hooks, checkpoints, long trainings, and many layers.

    make bench-hooks

- Hooks: all hooks of one step, with 0, 1 and 5 plugins that implement every one with `pass`.
- Checkpoints: what the plugin adds to a step that saves nothing, and what one save takes beside
  `torch.save` of the same state.
- Steps: a quantization-aware step beside a plain one, in turns over the whole training. A cost that
  stays flat has no growth.
- Layers: preparing, a step and converting with 10, 100 and 1,000 layers. A linear cost has the
  exponent 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression_manager import CompressionManager, prepare_compression
from compression_plugins import CheckpointConfig, QATConfig
from measuring import machine
from measuring.empty_plugin import manager_with
from measuring.fits import exponent, last_exponent, relative_growth
from measuring.models import WORKLOADS
from measuring.report import RESULTS, write_json
from measuring.timing import Spread, interleaved, milliseconds, ratios
from measuring.trainer import Trainer

HOOK_BAR = 25.0
"""Microseconds a step."""

LINEAR_BAR = 1.15
"""Largest exponent that counts as linear: what timing cannot tell from 1."""

BATCH = (torch.randn(8, 8), torch.randint(8, (8,)), torch.arange(8))


def hook_overhead(
    counts: Sequence[int] = (0, 1, 5), rounds: int = 40, steps: int = 250
) -> dict[str, dict[str, float]]:
    """Return number of plugins -> microseconds that all hooks of one step take.

    `cpu` is the median in time of the processor. Hooks wait for nothing, so that on a quiet
    machine both are the same; on a busy one this is what they cost.
    """
    model = nn.Linear(8, 8)
    arms = {str(count): _hooked(manager_with(count, model), steps) for count in counts}
    durations = interleaved(arms, rounds, warm_up=3)
    found = {}
    for name, own in durations.items():
        spread = Spread.of([1e6 * duration.passed / steps for duration in own])
        by_cpu = statistics.median(1e6 * duration.cpu / steps for duration in own)
        found[name] = vars(spread) | {"cpu": by_cpu}
    return found


def _hooked(manager: CompressionManager, steps: int) -> Callable[[int], None]:
    input, output, loss = torch.ones(1), torch.ones(1), torch.tensor(1.0, requires_grad=True)

    def run(number: int) -> None:
        for step in range(number * steps, (number + 1) * steps):
            manager.on_step_begin(step)
            manager.on_after_compute_loss(input, output, loss)
            manager.on_before_optimizer_step()
            manager.on_after_optimizer_step()
            manager.on_step_end()

    return run


def checkpoint_cost(shrink: int = 1, rounds: int = 5, steps: int = 250) -> dict[str, float]:
    """Return what checkpoints cost a step that saves none, and what one save costs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        idle = _idle(folder / "idle", 4 * rounds, steps)
        return {"idle_us": idle} | _saving(folder, shrink, rounds)


def _idle(folder: Path, rounds: int, steps: int) -> float:
    """Return the microseconds that the plugin adds to the hooks of a step."""
    never = CheckpointConfig(folder, save_every_epochs=None, save_every_steps=10**9)
    manager = prepare_compression(nn.Linear(8, 8), [never])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    arms = {
        "with": _hooked(manager, steps),
        "without": _hooked(manager_with(0, nn.Linear(8, 8)), steps),
    }
    durations = interleaved(arms, rounds, warm_up=2)
    pairs = zip(durations["with"], durations["without"], strict=True)
    return statistics.median(1e6 * (own.passed - other.passed) / steps for own, other in pairs)


def _saving(folder: Path, shrink: int, rounds: int) -> dict[str, float]:
    """Time a save against `torch.save`, which is pickled, not verified and lost in a crash."""
    workload = WORKLOADS["encoder"](shrink)
    config = CheckpointConfig(folder / "saved", save_every_epochs=None, save_every_steps=1)
    trainer = Trainer(workload.build(), [QATConfig(), config])
    manager = trainer.manager
    manager.track(optimizer=trainer.optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a state is saved after")  # nobody resumes these
        for number in range(2):
            trainer.step(number, *workload.batches[0])
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    tensors = [*trainer.model.state_dict().values()]
    tensors += [item["momentum_buffer"] for item in trainer.optimizer.state.values()]
    megabytes = sum(tensor.nbytes for tensor in tensors) / 1e6

    def plainly(number: int) -> None:
        with (folder / "plain.pt").open("wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())

    def saving(number: int) -> None:
        manager.on_step_end()

    def without_timing() -> None:
        loss = trainer.loss(2, *workload.batches[0])
        loss.backward()
        manager.on_before_optimizer_step()
        trainer.optimizer.step()
        manager.on_after_optimizer_step()

    taken: dict[str, list[Any]] = {"save": [], "torch.save": []}
    for number in range(rounds + 1):
        without_timing()  # the step around the save is not timed
        one = interleaved({"save": saving, "torch.save": plainly}, 1, start=number)
        for name, own in one.items():
            taken[name] += own[: number > 0]
    return {
        "megabytes": megabytes,
        "save_ms": milliseconds(taken["save"]),
        "torch_save_ms": milliseconds(taken["torch.save"]),
        "ratio": statistics.median(ratios(taken["save"], taken["torch.save"])),
    }


def growth_over_steps(counts: Sequence[int] = (1_000, 10_000, 100_000)) -> dict[str, Any]:
    """Return how the time of a step and the number of live objects change over a long training.

    Blocks of hooked and of plain steps take turns, so that the machine's own drift cancels out.
    """
    block = max(1, min(counts) // 10)
    hooked, plain = Trainer(_chain(1), [QATConfig()]), Trainer(_chain(1))
    arms = {"hooked": _steps(hooked, block), "plain": _steps(plain, block)}
    objects: dict[int, int] = {}
    durations: dict[str, list[Any]] = {name: [] for name in arms}
    interleaved(arms, 1)
    done = block
    for count in counts:
        more = interleaved(arms, (count - done) // block, start=done // block)
        for name, own in more.items():
            durations[name] += own
        done = count
        gc.collect()
        objects[count] = len(gc.get_objects())
    relative = ratios(durations["hooked"], durations["plain"])
    ends = [block * (number + 2) for number in range(len(relative))]
    microseconds, before = {}, 0
    for count in counts:
        inside = [
            1e6 * (own.passed - other.passed) / block
            for own, other, end in zip(*durations.values(), ends, strict=True)
            if before < end <= count
        ]
        microseconds[str(count)], before = statistics.median(inside), count
    return {
        "overhead_us": microseconds,
        "objects": {str(count): number for count, number in objects.items()},
        "growth": relative_growth(ends, _without_outliers(relative)),
    }


def _without_outliers(values: Sequence[float]) -> list[float]:
    """Cut what lies far out, a moment in which another process had the machine, to the bounds."""
    spread = Spread.of(values)
    reach = 3 * (spread.high - spread.low)
    return [min(max(value, spread.low - reach), spread.high + reach) for value in values]


def cost_over_layers(
    counts: Sequence[int] = (10, 100, 1_000), rounds: int = 3
) -> dict[str, dict[str, Any]]:
    """Return what -> number of layers -> milliseconds, and the exponents of the power law."""
    found: dict[str, dict[int, float]] = {"prepare": {}, "step": {}, "convert": {}}
    gc.freeze()  # the garbage collector is to look through these layers, not through all of torch
    for count in counts:
        taken: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(rounds):
            for name, seconds in _life(count).items():
                taken[name].append(1e3 * seconds)
        for name, values in taken.items():
            found[name][count] = min(values)  # disturbances only add
    gc.unfreeze()
    return {
        name: {
            "ms": {str(count): value for count, value in costs.items()},
            "exponent": exponent(costs),
            "last_exponent": last_exponent(costs),
        }
        for name, costs in found.items()
    }


def _life(layers: int) -> dict[str, float]:
    model, plain = _chain(layers), Trainer(_chain(layers))
    input = BATCH[0]
    seconds = {}
    start = time.perf_counter()
    manager = prepare_compression(model, [QATConfig()], example_inputs=input)
    seconds["prepare"] = time.perf_counter() - start
    manager.close()
    trainer = Trainer(model, [QATConfig()])
    durations = interleaved({"own": _steps(trainer, 1), "plain": _steps(plain, 1)}, 5, warm_up=3)
    pairs = zip(durations["own"], durations["plain"], strict=True)
    seconds["step"] = statistics.median(own.passed - other.passed for own, other in pairs)
    start = time.perf_counter()
    trainer.manager.convert(input)
    seconds["convert"] = time.perf_counter() - start
    return seconds


def _chain(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))


def _steps(trainer: Trainer, count: int) -> Callable[[int], None]:
    def run(number: int) -> None:
        for step in range(number * count, (number + 1) * count):
            trainer.step(step, *BATCH)

    return run


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run from the command line; return what was measured."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    described = machine.describe_machine()
    document: dict[str, Any] = {"benchmark": "hooks", "machine": described}
    print(machine.in_words(described), flush=True)

    hooks = document["hooks"] = hook_overhead(rounds=options.rounds)
    print("\nall hooks of one step")
    for count, spread in hooks.items():
        verdict = "meets" if spread["cpu"] <= HOOK_BAR else "misses"
        print(
            f"  {count} plugins: {spread['median']:.1f} us ({spread['low']:.1f}-"
            f"{spread['high']:.1f}), by CPU {spread['cpu']:.1f}: {verdict} the bar of "
            f"{HOOK_BAR:.0f}",
            flush=True,
        )
    saved = document["checkpoint"] = checkpoint_cost(options.shrink, min(5, options.rounds))
    print("\ncheckpoints")
    print(f"  a step that saves nothing: {saved['idle_us']:.1f} us more")
    print(
        f"  a save of {saved['megabytes']:.0f} MB: {saved['save_ms']:.0f} ms; torch.save and "
        f"fsync: {saved['torch_save_ms']:.0f} ms; ratio {saved['ratio']:.2f}",
        flush=True,
    )
    steps = document["steps"] = growth_over_steps(options.steps)
    print("\nwhat quantization-aware training adds to a step of a single small layer")
    for count, overhead in steps["overhead_us"].items():
        print(f"  until step {count}: {overhead:.0f} us; live objects {steps['objects'][count]:,}")
    print(f"  growth of the step's ratio to a plain one, first to last: {steps['growth']:+.1%}")

    layers = document["layers"] = cost_over_layers(options.layers, min(3, options.rounds))
    print("\nlayers")
    for name, costs in layers.items():
        shown = ", ".join(f"{count}: {value:.1f} ms" for count, value in costs["ms"].items())
        verdict = "linear" if costs["last_exponent"] <= LINEAR_BAR else "more than linear"
        print(
            f"  {name}: {shown}; exponent {costs['exponent']:.2f}, of the last two "
            f"{costs['last_exponent']:.2f}: {verdict}",
            flush=True,
        )
    write_json(options.json, document)
    return document


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="of 250 steps with hooks alone")
    parser.add_argument("--steps", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 100, 1_000])
    parser.add_argument("--shrink", type=int, default=1, help="divide the sizes, for a quick look")
    # Small steps wait for nothing but Python.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "hooks.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
