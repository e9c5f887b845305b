"""What each `TeacherRuntime` saves and costs, for a convolutional and a transformer teacher.

    make bench-teacher

Trains both teachers for a few epochs on the embedded images, then runs every option in turn, round
after round in one process, so that a busy machine slows all of them. Takes about ten minutes on two
cores, most of it training and compiling. Results: runs/teacher_runtime/summary.json, from which the
tables of docs/how-to/speed-up-the-teacher.md are written.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_plugins import TeacherRuntime
from compression_plugins.distillation.teachers.distortion import measure_distortion
from compression_plugins.distillation.teachers.runtime import running_teacher
from compression_plugins.distillation.teachers.teacher import Teacher
from measuring.timing import interleaved, milliseconds, ratios

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import fashion_mnist
import models

BASELINE = "float32"
OPTIONS = {
    BASELINE: TeacherRuntime(),
    "bfloat16": TeacherRuntime("bfloat16"),
    "int8": TeacherRuntime("int8"),
    "channels_last": TeacherRuntime(channels_last=True),
    "compile": TeacherRuntime(compile=True),
    "bfloat16, compile": TeacherRuntime("bfloat16", compile=True),
    "int8, compile": TeacherRuntime("int8", compile=True),
    "channels_last, compile": TeacherRuntime(compile=True, channels_last=True),
}


class RowTransformer(nn.Module):
    """Reads an image as 28 tokens, its rows: (N, 1, 28, 28) float -> (N, 10) logits."""

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(28, width)
        self.position = nn.Parameter(torch.zeros(28, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits of the mean token."""
        hidden: Tensor = self.encoder(self.embed(input.squeeze(1)) + self.position)
        logits: Tensor = self.head(hidden.mean(1))
        return logits


TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "CNN": models.teacher,
    "transformer": RowTransformer,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print the tables and write them."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    data = fashion_mnist.load()
    results: dict[str, Any] = {"machine": describe_machine(options.device), "teachers": {}}
    for name, build in TEACHERS.items():
        torch.manual_seed(0)
        model = build().to(options.device)
        train(model, data.train, options.epochs, options.train_images)
        # The images lie class after class.
        chosen = torch.randperm(len(data.validation))[: options.images]
        images = data.validation.images[chosen].to(options.device)
        rows = measure(model, images, options)
        results["teachers"][name] = rows
        print(f"\n{name}, batches of {options.batch_size}, {results['machine']}\n")
        print(table(rows), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "summary.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote {path}")


def measure(
    model: nn.Module, images: Tensor, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return option -> figures; the times are those of one forward pass."""
    batches = images.split(options.batch_size)
    teachers = {
        name: Teacher(running_teacher(model.eval(), OPTIONS[name])) for name in options.options
    }
    reference = _logits(Teacher(model), batches)
    rows: dict[str, dict[str, float]] = {}
    for name, teacher in teachers.items():
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        teacher.run(batches[0])
        first = _elapsed(start, images.device)
        distortion = measure_distortion(reference, _logits(teacher, batches))
        rows[name] = {
            "first_s": first,
            "megabytes": _size(teacher.model) / 1e6,
            "kl": distortion.kl,
            "top1_agreement": distortion.top1_agreement,
        }
    arms = {name: _arm(teacher, batches[0]) for name, teacher in teachers.items()}
    durations = interleaved(arms, options.rounds)
    for name, own in durations.items():
        relative = ratios(own, durations[BASELINE])
        rows[name] |= {
            "ms": milliseconds(own),
            "ratio": statistics.median(relative),
            "lowest_ratio": min(relative),
            "highest_ratio": max(relative),
        }
    return rows


def _arm(teacher: Teacher, batch: Tensor) -> Callable[[int], None]:
    def run(number: int) -> None:
        teacher.run(batch)
        _wait(batch.device)

    return run


def train(model: nn.Module, data: fashion_mnist.Split, epochs: int, limit: int) -> None:
    """Train on `limit` images, so that the logits are those of a model that has learned."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for indices in torch.randperm(len(data))[:limit].split(64):
            optimizer.zero_grad()
            logits = model(data.images[indices].to(device))
            F.cross_entropy(logits, data.labels[indices].to(device)).backward()
            optimizer.step()


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table."""
    lines = [
        "| option | ms | time / float32's | first batch, s | weights, MB | KL | top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ratio = f"{row['ratio']:.2f} ({row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f})"
        lines.append(
            f"| {name} | {row['ms']:.1f} | {ratio} | {row['first_s']:.1f} | "
            f"{row['megabytes']:.2f} | {row['kl']:.1e} | {row['top1_agreement']:.4f} |"
        )
    return "\n".join(lines)


def describe_machine(device: str) -> str:
    """Return what ran, in words."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpu = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.machine()} CPU ({cpu}), torch {torch.__version__}"


def _logits(teacher: Teacher, batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([teacher.run(batch) for batch in batches])


def _size(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _elapsed(start: float, device: torch.device) -> float:
    _wait(device)
    return time.perf_counter() - start


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--options", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--rounds", type=int, default=7, help="forward passes of each option")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--train-images", type=int, default=500)
    parser.add_argument("--images", type=int, default=208, help="for KL and agreement")
    parser.add_argument("--epochs", type=int, default=3)
    # With more, each operation waits for the thread that another process holds up.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/teacher_runtime"))
    options = parser.parse_args(arguments)
    options.options = list(dict.fromkeys([BASELINE, *options.options]))
    return options


if __name__ == "__main__":
    main()
