"""Compare ways to quantize one network on real images, paired over seeds.

From one float network per seed, each arm trains for the same further steps on the same batches:
in float, quantization-aware with int8, with int4 weights, and with four bits for weights and
inputs, once with ranges from minimum and maximum and once with learned scales. Post-training
quantization takes the float arm's result. Every accuracy is that of the converted model.

    make study DATA=<folder with the four idx files>

Finished seeds are skipped. Results: runs/study/summary.json, summary.md and summary.png.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fashion_mnist
import models
from compression_manager import CompressionError, CompressionManager, prepare_compression
from compression_manager.plugin import PluginConfig
from compression_manager.quantization import QuantizationScheme
from compression_plugins import (
    CalibrationConfig,
    LearnedScaleConfig,
    ProgressConfig,
    PTQConfig,
    QATConfig,
)
from fashion_mnist import Split, Splits
from study_statistics import check_same_settings, described

INT4_WEIGHT = QuantizationScheme(4, granularity="channel")
UINT4_INPUT = QuantizationScheme(4, symmetric=False, signed=False)
FOUR_FOUR = QATConfig(weight=INT4_WEIGHT, activation=UINT4_INPUT)


@dataclass(frozen=True)
class Arm:
    """One way to train: with these plugins beside the progress bar."""

    name: str
    title: str
    configs: tuple[PluginConfig, ...]


FLOAT = "float32"
AFTER_TRAINING = "ptq_int8"
# Chosen on validation images: with torch's 0.01, ranges lag behind in so short a training.
RANGES = CalibrationConfig(averaging_constant=0.1)
ARMS = (
    Arm(FLOAT, "float32", ()),
    Arm("qat_int8", "quantization-aware int8", (QATConfig(), RANGES)),
    Arm(
        "qat_int4_weight",
        "quantization-aware, int4 weights",
        (QATConfig(weight=INT4_WEIGHT), RANGES),
    ),
    Arm("min_max_4_4", "4-bit weights and inputs, min-max", (FOUR_FOUR, RANGES)),
    Arm("lsq_4_4", "4-bit weights and inputs, learned", (LearnedScaleConfig(), FOUR_FOUR, RANGES)),
)
TITLES = {FLOAT: "float32", AFTER_TRAINING: "static int8 after training"} | {
    arm.name: arm.title for arm in ARMS
}
PAIRS = (
    *((name, FLOAT) for name in TITLES if name != FLOAT),
    ("qat_int8", AFTER_TRAINING),
    ("qat_int4_weight", "qat_int8"),
    ("lsq_4_4", "min_max_4_4"),
)


@dataclass(frozen=True)
class Budget:
    """How long the common float network and then each arm is trained."""

    float_epochs: int
    arm_epochs: int
    batch_size: int = 128
    float_rate: float = 0.01
    arm_rate: float = 0.002


def train(
    manager: CompressionManager, data: Split, epochs: int, rate: float, batch_size: int, seed: int
) -> None:
    """Train the manager's model in a plain loop with its hooks."""
    model = manager.model
    generator = torch.Generator().manual_seed(seed)
    dataset = TensorDataset(data.images, data.labels)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    manager.track(optimizer=optimizer, dataloader=loader)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    manager.on_train_begin()
    for epoch in range(epochs):
        manager.on_epoch_begin(epoch)
        model.train()
        for step, (images, labels) in enumerate(loader):
            manager.on_step_begin(step)
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss = manager.on_after_compute_loss(images, logits, loss)
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            manager.on_step_end()
        manager.on_epoch_end()
    manager.on_train_end()


def train_float(model: nn.Module, data: Split, budget: Budget, seed: int) -> None:
    """Train the network from which all arms start."""
    with prepare_compression(model, [ProgressConfig(description="start")]) as manager:
        train(manager, data, budget.float_epochs, budget.float_rate, budget.batch_size, seed)


def run_arm(
    arm: Arm, start: nn.Module, splits: Splits, budget: Budget, seed: int
) -> tuple[nn.Module, nn.Module]:
    """Return the trained network, and the one that would be deployed."""
    torch.manual_seed(seed)
    model = copy.deepcopy(start)
    configs = [*arm.configs, ProgressConfig(description=arm.name)]
    with prepare_compression(model, configs) as manager:
        train(manager, splits.train, budget.arm_epochs, budget.arm_rate, budget.batch_size, seed)
        if not arm.configs:
            return model.eval(), model
        return model, manager.convert(splits.validation.images[:128])


def quantize_after_training(trained: nn.Module, splits: Splits) -> nn.Module:
    """Return the static int8 network, calibrated on 1,024 training images."""
    batches = splits.train.images[:1024].split(128)
    with prepare_compression(copy.deepcopy(trained), [PTQConfig(calibration_data=batches)]) as ptq:
        return ptq.convert(splits.validation.images[:128])


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the fraction of right predictions."""
    predictions = torch.cat([model(batch).argmax(1) for batch in split.images.split(500)])
    return (predictions == split.labels).double().mean().item()


def run_seed(
    splits: Splits, judged: Split, folder: Path, budget: Budget, seed: int
) -> dict[str, float]:
    """Return name -> accuracy on the images `judged`; a finished seed is read."""
    finished = folder / f"seed-{seed}.json"
    if not finished.exists():
        torch.manual_seed(seed)
        start = models.student()
        train_float(start, splits.train, budget, seed)
        results = {}
        for arm in ARMS:
            trained, deployed = run_arm(arm, start, splits, budget, seed)
            results[arm.name] = accuracy(deployed, judged)
            if arm.name == FLOAT:
                results[AFTER_TRAINING] = accuracy(quantize_after_training(trained, splits), judged)
        finished.write_text(json.dumps(results))
    results = json.loads(finished.read_text())
    print(f"seed {seed}: {', '.join(f'{k} {v:.2%}' for k, v in results.items())}", flush=True)
    return results


def summarize(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return means, and the paired differences with their 95% confidence intervals."""
    return {
        "accuracy": {name: described([run[name] for run in runs]) for name in TITLES},
        "differences": {
            f"{one} - {other}": described([run[one] - run[other] for run in runs])
            for one, other in PAIRS
        },
        "seeds": list(runs),
    }


def to_markdown(summary: dict[str, Any]) -> str:
    """Return both tables and whether the two goals are met."""
    seeds = len(summary["seeds"])
    lines = [f"| way to quantize ({seeds} seeds) | accuracy |", "|---|---|"]
    for name, title in TITLES.items():
        entry = summary["accuracy"][name]
        lines.append(f"| {title} | {entry['mean']:.2%} ± {100 * entry['half_width']:.2f} |")
    lines += ["", "| paired difference | points, 95% interval |", "|---|---|"]
    for name, entry in summary["differences"].items():
        lines.append(f"| {name} | {100 * entry['mean']:+.2f} ± {100 * entry['half_width']:.2f} |")
    lines += ["", *(f"{'met' if met else 'MISSED'}: {goal}" for goal, met in goals(summary))]
    return "\n".join(lines) + "\n"


def goals(summary: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return what was to be shown, and whether it was."""
    int8 = summary["differences"]["qat_int8 - float32"]
    lsq = summary["differences"]["lsq_4_4 - min_max_4_4"]
    return [
        (
            "quantization-aware int8 is no worse than float32 within the interval",
            int8["mean"] + int8["half_width"] >= 0,
        ),
        ("learned scales beat min-max at 4/4 bits", lsq["mean"] > 0),
        (
            "learned scales beat min-max at 4/4 bits beyond the interval",
            lsq["mean"] > lsq["half_width"],
        ),
    ]


def draw(summary: dict[str, Any], path: Path) -> None:
    """Write the paired differences as a chart."""
    entries = list(reversed(summary["differences"].items()))
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(entries) + 1.2), layout="constrained")
    means = [100 * entry["mean"] for _, entry in entries]
    widths = [100 * entry["half_width"] for _, entry in entries]
    axes.errorbar(means, range(len(entries)), xerr=widths, fmt="o", capsize=4, color="#4c72b0")
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(entries)), [name for name, _ in entries])
    axes.set_xlabel("difference in test accuracy, points (paired over seeds, 95% interval)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the four idx files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--float-epochs", type=int, default=6)
    parser.add_argument("--arm-epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--judge-on",
        choices=("validation", "test"),
        default="test",
        help="validation while settings are chosen, test once they are",
    )
    options = parser.parse_args(arguments)

    splits = fashion_mnist.load(options.data)
    budget = Budget(options.float_epochs, options.arm_epochs)
    judged: Split = getattr(splits, options.judge_on)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {"data": str(options.data), "judged on": options.judge_on, **asdict(budget)}
    check_same_settings(options.output / "settings.json", settings)
    runs = [run_seed(splits, judged, options.output, budget, seed) for seed in range(options.seeds)]
    summary = summarize(runs)
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2))
    text = to_markdown(summary)
    (options.output / "summary.md").write_text(text)
    draw(summary, options.output / "summary.png")
    print(f"\n{text}\nwritten: {options.output}/summary.json, summary.md, summary.png")


if __name__ == "__main__":
    try:
        main()
    except CompressionError as error:
        raise SystemExit(f"error: {error}") from error
