"""One run of the distillation study: training a student, and testing it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import distill_and_quantize as demo
from compression_manager import (
    CompressionManager,
    Plugin,
    PluginConfig,
    hookimpl,
    option,
    prepare_compression,
)
from compression_manager.metrics import Metric
from distillation_strategies import BY_NAME, Setting, Strategy
from distillation_teachers import (
    RecordedTeacher,
    Setup,
    load,
    load_teacher,
    teacher_folder,
    variants,
)

EVALUATE_EVERY = 5  # epochs, for all alike


@dataclass(frozen=True)
class Run:
    """A student to train: a strategy, the index of its setting, and a seed."""

    strategy: str
    point: int
    seed: int

    @property
    def setting(self) -> Setting:
        """What the index stands for."""
        strategy = BY_NAME[self.strategy]
        return (BY_NAME[strategy.like] if strategy.like else strategy).grid[self.point]

    def path(self, setup: Setup) -> Path:
        """Where its result lies once it is finished."""
        return setup.folder / "runs" / f"{self.strategy}-{self.point}-seed-{self.seed}.json"


@dataclass(frozen=True)
class LossTermsConfig(PluginConfig):
    """Keeps what the loss consists of."""

    plugin: ClassVar[str] = "loss_terms"

    prefix: str = field(default="loss/", metadata=option("What the metrics' names begin with."))


class LossTermsPlugin(Plugin[LossTermsConfig]):
    """Holds the latest value of every loss term, to be reported beside the accuracy."""

    config_class = LossTermsConfig

    def __init__(self, config: LossTermsConfig) -> None:
        super().__init__(config)
        self.latest: dict[str, Metric] = {}

    @hookimpl
    def consume_metrics(self, metrics: Sequence[Metric]) -> None:
        """Keep the loss terms."""
        for metric in metrics:
            if metric.name.startswith(self.config.prefix):
                self.latest[metric.name] = metric


def make_teacher(setup: Setup, strategy: Strategy, seed: int) -> nn.Module | None:
    """Return whom the strategy's student learns from; None where that is the student itself."""
    if strategy.source in ("nobody", "itself"):
        return None
    if strategy.source == "caller":
        return load_teacher(setup, seed)
    logits = {
        "recorded": "logits",
        "int8": "int8_logits",
        "bfloat16": "bfloat16_logits",
        "ensemble": "ensemble_logits",
    }[strategy.source]
    return RecordedTeacher(teacher_folder(setup, seed), logits, strategy.layers)


def untrained_student(seed: int) -> nn.Module:
    """Return the start of all strategies, in the memory format that CPUs are faster with."""
    student, _ = demo.networks(seed)
    return student.to(memory_format=torch.channels_last)


def train_student(setup: Setup, run: Run) -> None:
    """Train one student; write its result, and its weights of the best epoch beside it."""
    started = time.process_time()
    strategy = BY_NAME[run.strategy]
    splits = load(setup.images_per_class)
    training = dataclasses.replace(
        demo.STUDENT_TRAINING, epochs=setup.student_epochs, shift=setup.student_shift
    )
    steps = training.epochs * (len(splits.train) // training.batch_size)
    teacher = make_teacher(setup, strategy, run.seed)
    student = untrained_student(run.seed)
    terms = LossTermsPlugin(LossTermsConfig())
    calls_teacher = strategy.source == "caller"
    configs = strategy.build(None if calls_teacher else teacher, steps, run.setting)
    with prepare_compression(student, [*configs, terms], seed=run.seed) as manager:
        lookup = isinstance(teacher, RecordedTeacher)
        caller = teacher if calls_teacher else None
        history, best = _train(manager, training, steps, setup, run.seed, lookup, caller)
    best_epoch = max(history, key=lambda epoch: history[epoch])
    path = run.path(setup)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(best, path.with_suffix(".safetensors"))
    result = {
        **dataclasses.asdict(run),
        "setting": run.setting,
        "validation": history,
        "best_epoch": best_epoch,
        "best_validation": history[best_epoch],
        "last_loss_terms": {name: metric.as_float() for name, metric in terms.latest.items()},
        "cpu_seconds": time.process_time() - started,
    }
    _write(path, result)


def _train(
    manager: CompressionManager,
    training: demo.Training,
    steps: int,
    setup: Setup,
    seed: int,
    lookup: bool,
    caller: nn.Module | None,
) -> tuple[dict[int, float], dict[str, Tensor]]:
    """Train the manager's model.

    Args:
        manager: of the student.
        training: budget and settings.
        steps: in all epochs.
        setup: of the study.
        seed: of the order of the images and their variants, the same for all strategies.
        lookup: whether the teacher is called with indices instead of images.
        caller: a teacher that the loop calls itself.

    Returns:
        Epochs completed -> validation accuracy, and the weights at the first best of them.
    """
    model, splits, images = manager.model, load(setup.images_per_class), variants(setup)
    labels, count = splits.train.labels, len(splits.train)
    optimizer = torch.optim.AdamW(
        model.parameters(), training.learning_rate, weight_decay=training.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=steps, pct_start=0.2
    )
    manager.track(optimizer=optimizer, scheduler=scheduler)
    # Of its own, so that no strategy changes the order by drawing random numbers.
    generator = torch.Generator().manual_seed(seed)
    history: dict[int, float] = {}
    best: dict[str, Tensor] = {}
    manager.on_train_begin()
    for epoch in range(training.epochs):
        manager.on_epoch_begin(epoch)
        model.train()
        order = torch.randperm(count, generator=generator)
        variant = torch.randint(len(images) // count, (count,), generator=generator)
        for step in range(count // training.batch_size):
            chosen = order[step * training.batch_size : (step + 1) * training.batch_size]
            rows = variant[chosen] * count + chosen
            manager.on_step_begin(step)
            logits = model(images[rows])
            loss = F.cross_entropy(logits, labels[chosen])
            loss = manager.on_after_compute_loss(
                rows if lookup else images[rows],
                logits,
                loss,
                None if caller is None else _answer(caller, images[rows]),
                target=labels[chosen],
            )
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
            scheduler.step()
            manager.on_step_end()
        if (epoch + 1) % EVALUATE_EVERY == 0 or epoch + 1 == training.epochs:
            accuracy = demo.accuracy(model, splits.validation)
            if accuracy > max(history.values(), default=-1.0):
                best = {name: _copied(value) for name, value in model.state_dict().items()}
            history[epoch + 1] = accuracy
        manager.on_epoch_end()
    manager.on_train_end()
    return history, best


def _copied(value: Tensor) -> Tensor:
    """Return a copy in the layout that files have."""
    return value.detach().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def _answer(teacher: nn.Module, images: Tensor) -> Tensor:
    output: Tensor = teacher(images)
    return output


def test_student(setup: Setup, run: Run) -> dict[str, Any]:
    """Return the result of a finished run, with the accuracy on the test images; used once."""
    path = run.path(setup)
    result: dict[str, Any] = json.loads(path.read_text())
    if "test" not in result:
        student, _ = demo.networks(run.seed)
        student.load_state_dict(load_file(path.with_suffix(".safetensors")))
        result["test"] = demo.accuracy(student, load(setup.images_per_class).test)
        _write(path, result)
    return result


def _write(path: Path, result: dict[str, Any]) -> None:
    """Write at once, so that an interruption leaves no half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)
