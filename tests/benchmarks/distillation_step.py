"""What a training step costs with distillation: from a cache, and from the live teacher.

    make bench-distillation

Times the plain step, the step with a warm `TeacherCache` and the step with the live teacher, one
after the other on the same batch, and reports the median over all batches of the ratio to the
plain step beside it: in time passed and, which a busy machine disturbs less, in time of the
processor. Counts the teacher's forward passes, and compares the losses.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compression_manager.plugin import PluginConfig
from compression_plugins import (
    DistillationConfig,
    IndexedDataset,
    KnowledgeDistillationLossConfig,
    TeacherCache,
)
from measuring.timing import interleaved, milliseconds
from measuring.trainer import Trainer

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import models

BAR = 1.05
WARM_UP = 5
CRITERION = KnowledgeDistillationLossConfig(
    temperature=4.0, loss_types=("CE", "KL"), loss_weights=(0.5, 0.5)
)


@dataclass(frozen=True)
class Case:
    """A student, its teacher and the data that both take."""

    name: str
    student: nn.Module
    teacher: nn.Module
    data: TensorDataset
    batch_size: int


@dataclass(frozen=True)
class Result:
    """What was measured for one case; ratios are to the plain step.

    Attributes:
        plain_ms: median time of a plain step in milliseconds.
        cached: median ratio of the step with a warm cache.
        cached_quartiles: first and third quartile of the same.
        cached_cpu: median ratio in time of the processor, all threads together.
        live: median ratio of the step with the live teacher, over the first `live_steps`.
        lookup_ms: median time of the lookup alone in milliseconds.
        cached_teacher_forwards: forward passes of the teacher in all steps with the cache.
        live_teacher_forwards: the same with the live teacher.
        largest_loss_difference: between cache and live teacher, over the live steps.
    """

    case: str
    dtype: str
    threads: int
    steps: int
    live_steps: int
    plain_ms: float
    cached: float
    cached_quartiles: tuple[float, float]
    cached_cpu: float
    live: float
    lookup_ms: float
    cached_teacher_forwards: int
    live_teacher_forwards: int
    largest_loss_difference: float


class Counted(nn.Module):
    """A teacher that counts its forward passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards = inner, 0

    def forward(self, input: Tensor) -> Tensor:
        """Return what `inner` does."""
        self.forwards += 1
        output: Tensor = self.inner(input)
        return output


class Encoder(nn.Module):
    """A transformer encoder of pre-norm layers: (N, 32) int64 tokens -> (N, 100) logits."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 100)

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits of the mean over the tokens."""
        output: Tensor = self.head(self.encoder(self.embedding(input)).mean(1))
        return output


def trainer(case: Case, *configs: PluginConfig) -> Trainer:
    """Return what trains a copy of the case's student, a step at a time."""
    student = copy.deepcopy(case.student)
    return Trainer(student, configs, torch.optim.AdamW(student.parameters(), lr=1e-3))


def cases(names: Sequence[str], samples: int, batch_size: int | None) -> list[Case]:
    """Return the cases of the given names, with untrained weights and random data."""
    torch.manual_seed(0)
    made: dict[str, Callable[[], Case]] = {
        "demo": lambda: Case(
            "demo",
            models.student(),
            models.teacher(),
            TensorDataset(torch.randn(samples, 1, 28, 28), torch.randint(10, (samples,))),
            batch_size or 128,
        ),
        "encoder": lambda: Case(
            "encoder",
            Encoder(128, 2),
            Encoder(256, 4),
            TensorDataset(torch.randint(1000, (samples, 32)), torch.randint(100, (samples,))),
            batch_size or 32,
        ),
    }
    return [made[name]() for name in names]


def measure(case: Case, steps: int, live_steps: int, dtype: str, directory: Path) -> Result:
    """Build the cache, then time all arms on the same batches."""
    teacher = Counted(case.teacher)
    cache = TeacherCache(directory / case.name, dtype=dtype)
    # Batches of one size in one order, so that the live teacher's sums are those of the cache.
    loader = DataLoader(IndexedDataset(case.data), case.batch_size, drop_last=True)
    cache.build(teacher, loader)
    batches = list(loader)
    trainers = {
        "plain": trainer(case),
        "cached": trainer(case, DistillationConfig(teacher_cache=cache, criterion=CRITERION)),
        "live": trainer(case, DistillationConfig(teacher, criterion=CRITERION)),
    }
    forwards = dict.fromkeys(trainers, 0)
    losses: dict[str, list[float]] = {name: [] for name in trainers}

    def step(name: str, number: int) -> None:
        before = teacher.forwards
        losses[name].append(trainers[name].step(number, *batches[number % len(batches)]))
        forwards[name] += teacher.forwards - before

    arms: dict[str, Callable[[int], object]] = {
        name: functools.partial(step, name) for name in trainers
    }
    arms["lookup"] = lambda number: cache.lookup(batches[number % len(batches)][2])
    timed = interleaved(arms, live_steps, warm_up=WARM_UP)
    del arms["live"]
    later = interleaved(arms, steps - live_steps, start=WARM_UP + live_steps)
    for name, durations in later.items():
        timed[name] += durations
    # The live teacher has the first steps only.
    pairs = {name: list(zip(timed[name], timed["plain"], strict=False)) for name in forwards}
    passed = [own.passed / plain.passed for own, plain in pairs["cached"]]
    difference = max(
        abs(cached - live) for cached, live in zip(losses["cached"], losses["live"], strict=False)
    )
    quartiles = statistics.quantiles(passed, n=4)
    return Result(
        case=case.name,
        dtype=dtype,
        threads=torch.get_num_threads(),
        steps=steps,
        live_steps=live_steps,
        plain_ms=milliseconds(timed["plain"]),
        cached=statistics.median(passed),
        cached_quartiles=(quartiles[0], quartiles[2]),
        cached_cpu=statistics.median(own.cpu / plain.cpu for own, plain in pairs["cached"]),
        live=statistics.median(own.passed / plain.passed for own, plain in pairs["live"]),
        lookup_ms=milliseconds(timed["lookup"]),
        cached_teacher_forwards=forwards["cached"],
        live_teacher_forwards=forwards["live"],
        largest_loss_difference=difference,
    )


def table(results: Sequence[Result]) -> str:
    """Return the results as a table."""
    lines = [
        "case      dtype    threads  plain ms  cached (quartiles)   by CPU    live   lookup ms  "
        "forwards cached/live  loss difference"
    ]
    for item in results:
        low, high = item.cached_quartiles
        lines.append(
            f"{item.case:<9} {item.dtype:<8} {item.threads:>7}  {item.plain_ms:>8.2f}  "
            f"{item.cached:.3f} ({low:.3f}-{high:.3f})  {item.cached_cpu:.3f}  "
            f"{item.live:>6.3f}  {item.lookup_ms:>9.4f}  "
            f"{item.cached_teacher_forwards:>13}/{item.live_teacher_forwards:<6}  "
            f"{item.largest_loss_difference:>15.3g}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run from the command line; return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["demo", "encoder"], metavar="CASE")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "int8"])
    parser.add_argument("--steps", type=int, default=300, help="timed steps per case")
    parser.add_argument("--live-steps", type=int, default=20, help="of them with the teacher")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, help="default: 128 for demo, 32 for encoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    results: list[Result] = []
    for case in cases(options.cases, options.samples, options.batch_size):
        for dtype in options.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                results.append(
                    measure(case, options.steps, options.live_steps, dtype, Path(folder))
                )
    document: dict[str, Any] = {
        "torch": torch.__version__,
        "bar": BAR,
        "results": [asdict(item) for item in results],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "distillation_step.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    for item in results:
        verdict = "meets" if item.cached <= BAR else "misses"
        print(f"{item.case}, {item.dtype}: {verdict} the bar of {BAR}")
    print(f"wrote {path}")
    return results


if __name__ == "__main__":
    main()
