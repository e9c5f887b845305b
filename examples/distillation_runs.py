"""One run of the distillation study: training the teacher, recording it, training a student."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import distill_and_quantize as demo
import fashion_mnist
from compression_manager import (
    CompressionManager,
    Plugin,
    PluginConfig,
    hookimpl,
    option,
    prepare_compression,
)
from compression_manager.metrics import Metric
from compression_plugins import EnsembleTeacher, QuantizedTeacher
from distillation_strategies import BLOCKS, BY_NAME, FEATURES, Setting, Strategy
from fashion_mnist import Split, Splits

RECIPE = Path(__file__).parent / "recipes" / "distill_and_quantize.yaml"
EVALUATE_EVERY = 5  # epochs, for all alike
SECOND_TEACHER = 1000  # added to a seed gives that of the other member of its ensemble


@dataclass(frozen=True)
class Setup:
    """What all runs of a study have in common.

    Attributes:
        folder: of the results.
        student_shift: students' images move by up to so many pixels.
        student_epochs: of every student.
        teacher_epochs: of every teacher.
        images_per_class: uses only so many images of each split; None for all.
    """

    folder: Path
    student_shift: int = demo.STUDENT_TRAINING.shift
    student_epochs: int = demo.STUDENT_TRAINING.epochs
    teacher_epochs: int = demo.TEACHER_TRAINING.epochs
    images_per_class: int | None = None


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


class RecordedTeacher(nn.Module):
    """Answers from memory, so that a teacher runs once per image and not once per student.

    Called with the indices (N,) of images; its layers can be watched like the teacher's own, for
    which TeacherCache, which stores outputs only, does not serve.
    """

    def __init__(self, folder: Path, logits: str, layers: Sequence[str]) -> None:
        super().__init__()
        # Mapped into memory: all processes share one copy.
        self._recordings = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*layers, logits)
        }
        for name in self._recordings:
            self.add_module(name, nn.Identity())

    def forward(self, rows: Tensor) -> Tensor:
        """Return the logits (N, 10) for these images; the layers called before leave theirs."""
        output = rows
        for name, recording in self._recordings.items():
            output = self.get_submodule(name)(torch.from_numpy(recording[rows.numpy()]))
        return output


@functools.cache
def load(images_per_class: int | None) -> Splits:
    """Return the embedded images, or the first of each class."""
    splits = fashion_mnist.load()
    if images_per_class is None:
        return splits

    def first(split: Split) -> Split:
        chosen = torch.from_numpy(
            fashion_mnist.per_class(split.labels.numpy(), None, images_per_class)
        )
        return Split(split.images[chosen], split.labels[chosen])

    return Splits(first(splits.train), first(splits.validation), first(splits.test))


@functools.cache
def variants(setup: Setup) -> Tensor:
    """Return all that augmentation can make of the training images."""
    return fashion_mnist.variants(load(setup.images_per_class).train.images, setup.student_shift)


def teacher_folder(setup: Setup, seed: int) -> Path:
    """Where a seed's teacher and the recordings of it lie."""
    return setup.folder / "teachers" / f"seed-{seed}"


def is_trained(setup: Setup, seed: int) -> bool:
    """Return whether a seed's teacher is finished."""
    return (teacher_folder(setup, seed) / "result.json").exists()


def is_recorded(setup: Setup, seed: int) -> bool:
    """Return whether a seed's teacher was recorded."""
    return (teacher_folder(setup, seed) / "recorded").exists()


def train_teacher(setup: Setup, seed: int, threads: int) -> None:
    """Train the demo's teacher."""
    folder = teacher_folder(setup, seed)
    folder.mkdir(parents=True, exist_ok=True)
    training = dataclasses.replace(demo.TEACHER_TRAINING, epochs=setup.teacher_epochs)
    splits = load(setup.images_per_class)
    _, teacher = demo.networks(seed)
    torch.set_num_threads(threads)
    result = demo.train(teacher, demo.TEACHER, training, splits, RECIPE, folder, seed, None)
    torch.set_num_threads(1)
    (folder / "result.json").write_text(json.dumps(result["teacher"]))


def load_teacher(setup: Setup, seed: int) -> nn.Module:
    """Return a trained teacher."""
    _, teacher = demo.networks(seed)
    teacher.load_state_dict(load_file(teacher_folder(setup, seed) / "model.safetensors"))
    return teacher.eval()


@torch.no_grad()
def record_teacher(setup: Setup, seed: int) -> None:
    """Write down what the teacher, its int8 form and an ensemble say to every variant."""
    folder = teacher_folder(setup, seed)
    teacher = load_teacher(setup, seed)
    outputs: dict[str, Tensor] = {}
    for name in (*BLOCKS, FEATURES):
        teacher.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
    int8 = QuantizedTeacher(load_teacher(setup, seed), weights=True, dynamic=True)
    ensemble = EnsembleTeacher(
        [load_teacher(setup, member) for member in (seed, seed + SECOND_TEACHER)]
    )
    images = variants(setup)
    files: dict[str, Any] = {}
    for start in range(0, len(images), 500):
        batch = images[start : start + 500]
        outputs["logits"] = teacher(batch)
        outputs["int8_logits"] = int8(batch)
        outputs["ensemble_logits"] = ensemble(batch)
        for name, output in outputs.items():
            if name not in files:
                files[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", "w+", np.float32, (len(images), *output.shape[1:])
                )
            files[name][start : start + 500] = output.numpy()
    for file in files.values():
        file.flush()
    (folder / "recorded").touch()


def make_teacher(setup: Setup, strategy: Strategy, seed: int) -> nn.Module | None:
    """Return whom the strategy's student learns from; None where that is the student itself."""
    if strategy.source in ("nobody", "itself"):
        return None
    if strategy.source == "caller":
        return load_teacher(setup, seed)
    logits = {
        "recorded": "logits",
        "int8": "int8_logits",
        "ensemble": "ensemble_logits",
    }[strategy.source]
    return RecordedTeacher(teacher_folder(setup, seed), logits, strategy.layers)


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
    student, _ = demo.networks(run.seed)
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
                best = {name: value.clone() for name, value in model.state_dict().items()}
            history[epoch + 1] = accuracy
        manager.on_epoch_end()
    manager.on_train_end()
    return history, best


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
