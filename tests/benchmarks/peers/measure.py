"""Measure the peers of one environment beside float32, in turns; `run.py` starts this there.

    <environment>/bin/python tests/benchmarks/peers/measure.py --training "torchao PT2E"

Needs torch and the peers; the compression manager takes part where it is installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring.models import WORKLOADS, Workload
from measuring.outputs import relative_error
from measuring.timing import Spread, interleaved, milliseconds, ratios
from peers import adapters

BASELINE = "float32"
OURS = "compression manager"
WARM_UP = 3


class PeerTrainer:
    """The same loop for every peer: forward, loss, backward, the optimizer's step."""

    def __init__(self, model: nn.Module, workload: Workload) -> None:
        self.model, self._batches = model, workload.batches
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(self, number: int) -> None:
        """Make one step on the next batch."""
        inputs, targets, _ = self._batches[number % len(self._batches)]
        loss = F.cross_entropy(self.model(inputs), targets)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss.item()


def training_arms(
    workload: Workload, peers: Sequence[str]
) -> tuple[dict[str, Callable[[int], object]], dict[str, str]]:
    """Return what makes a step of each peer, and why the others cannot."""
    arms: dict[str, Callable[[int], object]] = {
        BASELINE: PeerTrainer(workload.build().train(), workload).step
    }
    failed: dict[str, str] = {}

    def own() -> Callable[[int], object]:
        from compression_plugins import QATConfig
        from measuring.trainer import Trainer

        trainer = Trainer(workload.build(), [QATConfig()])
        count = len(workload.batches)
        return lambda number: trainer.step(number, *workload.batches[number % count])

    def peer(name: str) -> Callable[[int], object]:
        model = adapters.TRAINING[name](workload.build().train(), workload.inputs)
        check_quantized(model, workload)
        return PeerTrainer(model, workload).step

    for name in peers:
        _try(name, lambda name=name: own() if name == OURS else peer(name), arms, failed)
    return arms, failed


def check_quantized(model: nn.Module, workload: Workload) -> None:
    """Raise RuntimeError if a prepared model computes in float what the float model does."""
    reference = workload.build().train()
    with torch.no_grad():
        for _ in range(2):  # some only observe at first
            output, expected = model(workload.inputs), reference(workload.inputs)
    _check_rounded(relative_error(output, expected))


def _check_rounded(error: float) -> None:
    if error < 1e-4:
        raise RuntimeError("it quantizes nothing: its output is that of the float model")


def inference_arms(
    workload: Workload, peers: Sequence[str], errors: dict[str, float]
) -> tuple[dict[str, Callable[[int], object]], dict[str, str]]:
    """Return what runs a batch with each peer, and why the others cannot.

    `errors` receives how far each output lies from the float model's.
    """
    inputs, model = workload.inputs, workload.build().eval()
    expected = model(inputs)
    arms: dict[str, Callable[[int], object]] = {BASELINE: lambda number: model(inputs)}
    failed: dict[str, str] = {}

    def arm(name: str, run: Callable[[Any], Any]) -> Callable[[int], object]:
        own = inputs.clone()  # which some compiled models overwrite
        errors[name] = relative_error(run(own), expected)
        _check_rounded(errors[name])
        return lambda number: run(own)

    def own(name: str) -> Callable[[int], object]:
        import inference  # the benchmark beside this folder

        subject = inference.subject_of(workload)
        route = next(route for route in inference.ROUTES if route.title == name.split(": ")[1])
        return arm(name, route.runner(subject))

    def peer(name: str) -> Callable[[int], object]:
        return arm(name, adapters.INFERENCE[name](workload.build().eval(), inputs.clone()))

    for name in peers:
        _try(name, lambda name=name: own(name) if OURS in name else peer(name), arms, failed)
    return arms, failed


def _try(
    name: str,
    build: Callable[[], Callable[[int], object]],
    arms: dict[str, Callable[[int], object]],
    failed: dict[str, str],
) -> None:
    print(f"  building {name} ...", file=sys.stderr, flush=True)
    try:
        arm = build()
        arm(0)  # what fails at the first call is no peer either
        arms[name] = arm
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        failed[name] = f"{type(error).__name__}: {lines[0][:200]}"
        print(f"  {name} failed: {failed[name]}", file=sys.stderr, flush=True)


def measure(
    what: str, workload: Workload, peers: Sequence[str], rounds: int, seconds: float | None
) -> list[dict[str, Any]]:
    """Return one entry per peer: name, ratio or speed-up with quartiles, or why it failed.

    A training step's ratio is its time by float32's; a speed-up is float32's time by the peer's.
    """
    errors: dict[str, float] = {}
    if what == "training":
        arms, failed = training_arms(workload, peers)
        durations = interleaved(arms, rounds, warm_up=WARM_UP, seconds=seconds, label=workload.name)
    else:
        with torch.no_grad():
            arms, failed = inference_arms(workload, peers, errors)
            durations = interleaved(
                arms,
                rounds,
                warm_up=WARM_UP,
                seconds=seconds,
                label=workload.name,
                settle=True,
            )
    entries = []
    for name in (BASELINE, *peers):
        entry: dict[str, Any] = {"what": what, "model": workload.name, "peer": name}
        entry["version"] = version_of(name)
        if name in failed:
            entry["failed"] = failed[name]
        else:
            own, baseline = durations[name], durations[BASELINE]
            values = ratios(own, baseline) if what == "training" else ratios(baseline, own)
            spread = Spread.of(values)
            entry |= {
                "value": spread.median,
                "quartiles": (spread.low, spread.high),
                "milliseconds": milliseconds(own),
                "rounds": len(own),
            }
            if name in errors:
                entry["error"] = errors[name]
        entries.append(entry)
    return entries


def version_of(peer: str) -> str | None:
    """Return the version of the peer's distribution, or None."""
    if peer.startswith(OURS):
        name = "compression-manager"
    else:
        name = adapters.DISTRIBUTIONS.get(peer, "torch")
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe(entry: dict[str, Any]) -> str:
    """Return one line of the table."""
    name = f"{entry['peer']} {entry['version'] or ''}".strip()
    if "failed" in entry:
        return f"  {name:<44}  failed: {entry['failed']}"
    spread = Spread(entry["value"], *entry["quartiles"])
    line = f"  {name:<44}  {spread!s:>21}  {entry['milliseconds']:>9.2f} ms"
    return line + (f"  error {entry['error']:.1e}" if "error" in entry else "")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run from the command line; return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--training", nargs="*", default=[], metavar="PEER")
    parser.add_argument("--inference", nargs="*", default=[], metavar="PEER")
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=["encoder"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds-per-model", type=float)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the peers' own, mostly on what they will remove
    torch.set_num_threads(options.threads)
    entries: list[dict[str, Any]] = []
    for name in options.models:
        workload = WORKLOADS[name](options.shrink)
        for what, peers in (("training", options.training), ("inference", options.inference)):
            if not peers:
                continue
            unit = "ratio of a step's time" if what == "training" else "speed-up"
            print(f"{name}, {what}: {unit}; {workload.description}", flush=True)
            found = measure(what, workload, peers, options.rounds, options.seconds_per_model)
            for entry in found:
                entry |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
                print(describe(entry), flush=True)
            entries += found
            if options.json is not None:
                options.json.write_text(json.dumps(entries, indent=2), encoding="utf-8")
    return entries


if __name__ == "__main__":
    main()
