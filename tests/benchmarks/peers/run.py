"""Build the peers' environments, and measure every peer beside float32 in each.

    make bench-peers
    python tests/benchmarks/peers/run.py --folder build/peers --seconds-per-model 60

Libraries that do not fit into one environment get one each. In every environment, float32 and the
peers take turns in one process; ratios are compared across environments, times are not. A peer that
cannot be installed, or fails, is listed with the reason. An environment that exists is used again;
delete its folder to build it anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import machine
from measuring.report import RESULTS, bar_chart, write_json

ROOT = Path(__file__).parents[3]
OURS = "compression manager"
OWN_ROUTES = (
    "int8, eager",
    "int8, Inductor",
    "int8, AOTInductor",
    "int8, onnxruntime",
    "int8, OpenVINO",
    "int8, OpenVINO, symmetric",
    "int8, OpenVINO, bfloat16",
)


@dataclass(frozen=True)
class Environment:
    """Libraries that fit together; ours is installed in each, because the ResNet uses a part of it.

    Attributes:
        requirements: beside torch.
        training: peers whose training step is measured.
        inference: peers whose int8 inference is measured.
    """

    name: str
    requirements: tuple[str, ...]
    training: tuple[str, ...] = ()
    inference: tuple[str, ...] = ()


TORCH = "torch==2.13.0"
ENVIRONMENTS = (
    Environment(
        "torchao-openvino-onnxruntime",
        ("torchao==0.18.0", "openvino", "nncf", "onnxruntime", "onnx", "onnxscript"),
        training=(OURS, "torchao PT2E", "torch.ao FX"),
        inference=(
            *(f"{OURS}: {title}" for title in OWN_ROUTES),
            "torchao PT2E + Inductor",
            "torch.ao FX int8",
            "OpenVINO int8 (NNCF)",
            "onnxruntime int8 QDQ",
        ),
    ),
    Environment("brevitas", ("brevitas",), training=(OURS, "Brevitas")),
    # It imports requests and huggingface_hub without asking for them.
    Environment(
        "modelopt",
        ("nvidia-modelopt==0.47.0", "requests", "huggingface_hub"),
        training=(OURS, "ModelOpt"),
    ),
    # It imports six and pkg_resources without asking for them, and fails with a newer numpy.
    Environment(
        "neural-compressor",
        ("neural-compressor==2.6", "numpy<2", "setuptools<80", "six"),
        training=("Neural Compressor 2.6",),
    ),
)


def build(environment: Environment, folder: Path) -> str | None:
    """Create the environment unless it is there; return why it cannot be, or None."""
    path = folder / environment.name
    stamp = path / ".installed"
    wanted = "\n".join([TORCH, *environment.requirements])
    if not (stamp.exists() and stamp.read_text() == wanted):
        print(f"building {path} ...", file=sys.stderr, flush=True)
        venv.create(path, with_pip=True, clear=path.exists())
        # First alone: what comes along with others may be a build for CUDA.
        for packages in ([TORCH], [TORCH, *environment.requirements]):
            reason = _pip(path, [*packages])
            if reason is not None:
                return reason
        stamp.write_text(wanted)
    # Ours changes between two runs, what it needs does not.
    return _pip(path, [str(ROOT)]) or _pip(path, ["--force-reinstall", "--no-deps", str(ROOT)])


def _pip(path: Path, arguments: Sequence[str]) -> str | None:
    command = [str(path / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "pip")


def measure(
    environment: Environment, folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run `measure.py` there; return its entries, or the reason for every peer."""
    output = folder / f"{environment.name}.json"
    output.unlink(missing_ok=True)
    peers = {"training": environment.training, "inference": environment.inference}
    command = [
        str(folder / environment.name / "bin" / "python"),
        str(Path(__file__).with_name("measure.py")),
        "--models",
        *options.models,
        "--rounds",
        str(options.rounds),
        "--seconds-per-model",
        str(options.seconds_per_model),
        "--threads",
        str(options.threads),
        "--shrink",
        str(options.shrink),
        "--json",
        str(output),
    ]
    for what, names in peers.items():
        if names:
            command += [f"--{what}", *names]
    # The libraries of the environment that runs this script do not belong there.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=variables, check=False)
    found = json.loads(output.read_text()) if output.exists() else []
    if done.returncode != 0:
        found += refused(environment, options.models, f"exit status {done.returncode}", found)
    return [entry | {"environment": environment.name} for entry in found]


def refused(
    environment: Environment,
    models: Sequence[str],
    reason: str,
    measured: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Return an entry with the reason for every peer that was not measured."""
    done = {(entry["what"], entry["model"], entry["peer"]) for entry in measured}
    return [
        {
            "what": what,
            "model": model,
            "peer": peer,
            "version": None,
            "failed": reason,
            "environment": environment.name,
        }
        for model in models
        for what in ("training", "inference")
        for peer in getattr(environment, what)
        if (what, model, peer) not in done
    ]


def table(entries: Sequence[dict[str, Any]], what: str) -> list[str]:
    """Return the lines of a table: peers below one another, models side by side."""
    chosen = [entry for entry in entries if entry["what"] == what and entry["peer"] != "float32"]
    models = list(dict.fromkeys(entry["model"] for entry in chosen))
    lines = [f"{'peer':<46}" + "".join(f"{model:>24}" for model in models)]
    notes = []
    for environment, peer in dict.fromkeys((e["environment"], e["peer"]) for e in chosen):
        cells = []
        for model in models:
            entry = next(
                e
                for e in chosen
                if (e["environment"], e["peer"], e["model"]) == (environment, peer, model)
            )
            if "failed" in entry:
                cells.append("failed")
                notes.append(f"  {peer}, {model}: {entry['failed']}")
            else:
                low, high = entry["quartiles"]
                cells.append(f"{entry['value']:.2f} ({low:.2f}-{high:.2f})")
        name = f"{peer} [{environment}]" if peer == OURS else peer
        lines.append(f"{name:<46}" + "".join(f"{cell:>24}" for cell in cells))
    return lines + notes


def chart(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Draw both kinds of figures, a panel per model."""
    for what, axis in (
        ("training", "time of a step, as a ratio to float32"),
        ("inference", "times the speed of float32 eager"),
    ):
        panels: dict[str, dict[str, tuple[float, float, float]]] = {}
        for entry in entries:
            if entry["what"] == what and "failed" not in entry:
                bar = (entry["value"], *entry["quartiles"])
                panels.setdefault(entry["model"], {}).setdefault(entry["peer"], bar)
        if panels:
            image = path.with_name(f"{path.stem}_{what}{path.suffix}")
            bar_chart(image, panels, title=f"Peers, {what} in int8", axis=axis)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run from the command line; return what was measured."""
    names = {environment.name: environment for environment in ENVIRONMENTS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--environments", nargs="+", choices=list(names), default=list(names))
    parser.add_argument("--models", nargs="+", default=["encoder", "resnet"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds-per-model", type=float, default=90.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--chart", type=Path, help="images to draw; needs matplotlib")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    described = machine.describe_machine() | {"threads": options.threads}
    entries: list[dict[str, Any]] = []
    for name in dict.fromkeys(options.environments):
        environment = names[name]
        print(f"\n== {name}", flush=True)
        reason = build(environment, folder)
        if reason is None:
            entries += measure(environment, folder, options)
        else:
            entries += refused(environment, options.models, reason)
            print(f"cannot be installed: {reason}", flush=True)
        document = {"benchmark": "peers", "machine": described, "results": entries}
        write_json(options.json, document)
    for what in ("training", "inference"):
        print(f"\n{what}")
        print("\n".join(table(entries, what)), flush=True)
    if options.chart is not None:
        chart(options.chart, entries)
    return entries


if __name__ == "__main__":
    main()
