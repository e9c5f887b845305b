"""Distil a small network from a teacher and make it int8, on real images.

Trains a teacher, then from one common start a student alone, distilled, quantization-aware, and
distilled and quantization-aware; converts the last one to int8, and compares them all.

    make demo                     one seed, embedded images
    make demo SEEDS=3             mean and spread over three seeds
    make demo DATA=<folder>       the full data set: the four idx files of Fashion-MNIST

Finished parts are skipped; an interrupted run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import demo_summary
import fashion_mnist
import models
from compression_manager import (
    CompressionError,
    CompressionManager,
    deploy,
    prepare_compression,
)
from fashion_mnist import Split, Splits


@dataclass(frozen=True)
class Arm:
    """One training: which plugins of the recipe take part, and how it is trained."""

    name: str
    title: str
    distillation: bool
    qat: bool


TEACHER = Arm("teacher", "teacher (small ResNet)", distillation=False, qat=False)
STUDENTS = (
    Arm("student", "student alone", distillation=False, qat=False),
    Arm("distilled", "student distilled", distillation=True, qat=False),
    Arm("qat", "student quantization-aware", distillation=False, qat=True),
    Arm("distilled_qat", "student distilled and quantization-aware", distillation=True, qat=True),
)


@dataclass(frozen=True)
class Training:
    """Budget and settings of one model; the same for all students, chosen on validation."""

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float
    shift: int  # images move by up to this many pixels at random


TEACHER_TRAINING = Training(
    epochs=18, learning_rate=0.01, batch_size=64, weight_decay=0.05, shift=1
)
STUDENT_TRAINING = Training(
    epochs=50, learning_rate=0.02, batch_size=128, weight_decay=0.02, shift=0
)


def train(
    model: nn.Module,
    arm: Arm,
    training: Training,
    splits: Splits,
    recipe: Path,
    folder: Path,
    seed: int,
    teacher: nn.Module | None,
) -> dict[str, Any]:
    """Train `model` in a plain loop with the manager's hooks; return what to report about it."""
    checkpoints = folder / "checkpoints"
    manager = prepare_compression(
        model,
        recipe,
        seed=seed,
        example_inputs=splits.train.images[:2],
        overrides=[
            f"plugins.distillation.enabled={arm.distillation}",
            f"plugins.qat.enabled={arm.qat}",
            f"plugins.checkpoint.directory={checkpoints}",
            f"plugins.tensorboard.directory={folder / 'tensorboard'}",
            f"plugins.progress.description={arm.name}",
        ],
        teacher_model=teacher,
    )
    data = TensorDataset(splits.train.images, splits.train.labels)
    loader = DataLoader(data, training.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), training.learning_rate, weight_decay=training.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.epochs * len(loader), pct_start=0.2
    )
    with manager:
        manager.track(optimizer=optimizer, scheduler=scheduler, dataloader=loader)
        position = manager.resume(checkpoints, missing_ok=True)
        if position.epoch:
            print(f"{arm.name}: resuming at epoch {position.epoch} of {training.epochs}")

        manager.on_train_begin()
        for epoch in range(position.epoch, training.epochs):
            manager.on_epoch_begin(epoch)
            model.train()
            for step, (images, labels) in enumerate(loader):
                manager.on_step_begin(step)
                images = fashion_mnist.augment(images, training.shift)
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
                loss = manager.on_after_compute_loss(images, logits, loss, target=labels)
                loss.backward()
                manager.on_before_optimizer_step()
                optimizer.step()
                manager.on_after_optimizer_step()
                optimizer.zero_grad()
                scheduler.step()
                manager.on_step_end()
            manager.on_before_eval()
            manager.on_after_eval({"accuracy": accuracy(model, splits.validation)})
            manager.on_epoch_end()
        manager.on_train_end()

        # The best epoch is chosen on validation images; the test images are used once, here.
        manager.load_weights(checkpoints, which="best")
        model.eval()
        predictions = predict(model, splits.test.images)
        results = {arm.name: measure(model, predictions, splits.test, folder / "model.safetensors")}
        if arm.name == "distilled_qat":
            examples = splits.validation.images[:256]
            results["int8"] = convert(manager, examples, predictions, splits.test, folder)
    return results


def convert(
    manager: CompressionManager, examples: Tensor, predictions: Tensor, test: Split, folder: Path
) -> dict[str, Any]:
    """Convert to int8, check parity, save, and load again as a server would."""
    int8 = manager.convert(examples)
    directory = manager.save_converted(folder / "int8")
    print(manager.report(examples), flush=True)
    served = deploy.load(directory, models.student())
    served_predictions = predict(served, test.images)
    if not torch.equal(served_predictions, predict(int8, test.images)):
        raise RuntimeError("the saved model predicts something else than the converted one")
    disagreement = (served_predictions != predictions).float().mean().item()
    return {
        "accuracy": _accuracy(served_predictions, test),
        "parameters": sum(parameter.numel() for parameter in models.student().parameters()),
        "bytes": sum(file.stat().st_size for file in directory.iterdir()),
        "path": str(directory),
        "disagreement_with_fake_quantized": disagreement,
    }


def measure(model: nn.Module, predictions: Tensor, test: Split, path: Path) -> dict[str, Any]:
    """Save the model's float weights and return its entry of the summary."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, path)
    return {
        "accuracy": _accuracy(predictions, test),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": path.stat().st_size,
        "path": str(path),
    }


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the predicted classes (N,) int64."""
    return torch.cat([model(batch).argmax(1) for batch in images.split(256)])


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the fraction of right predictions, in eval mode."""
    model.eval()
    return _accuracy(predict(model, split.images), split)


def _accuracy(predictions: Tensor, split: Split) -> float:
    return (predictions == split.labels).float().mean().item()


def networks(seed: int) -> tuple[nn.Module, nn.Module]:
    """Return the untrained student and teacher of a seed."""
    torch.manual_seed(seed)
    return models.student(), models.teacher()


def run_seed(
    splits: Splits, recipe: Path, folder: Path, seed: int, student_training: Training
) -> dict[str, Any]:
    """Train whatever is not finished for one seed; return the entries of the summary."""
    results: dict[str, Any] = {}
    start, teacher = networks(seed)
    for arm in (TEACHER, *STUDENTS):
        own = folder / arm.name
        finished = own / "result.json"
        if finished.exists():
            print(f"seed {seed}, {arm.title}: finished already, skipped ({finished})")
        else:
            print(f"seed {seed}, {arm.title}", flush=True)
            own.mkdir(parents=True, exist_ok=True)
            is_teacher = arm is TEACHER
            result = train(
                teacher if is_teacher else copy.deepcopy(start),
                arm,
                TEACHER_TRAINING if is_teacher else student_training,
                splits,
                recipe,
                own,
                seed,
                teacher if arm.distillation else None,
            )
            finished.write_text(json.dumps(result, indent=2))
        if arm is TEACHER:
            teacher.load_state_dict(load_file(own / "model.safetensors"))
        results.update(json.loads(finished.read_text()))
    demo_summary.add_latency(results, splits.test.images)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, help="folder with the four idx files")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--student-shift",
        type=int,
        default=STUDENT_TRAINING.shift,
        help="move the students' images by up to so many pixels at random, as the teacher's",
    )
    parser.add_argument("--fresh", action="store_true", help="delete earlier results first")
    options = parser.parse_args(arguments)

    if options.fresh:
        shutil.rmtree(options.output, ignore_errors=True)
    splits = fashion_mnist.load(options.data)
    student_training = dataclasses.replace(STUDENT_TRAINING, shift=options.student_shift)
    demo_summary.check_same_settings(
        options.output, options.recipe, options.data, (TEACHER_TRAINING, student_training)
    )
    runs = [
        run_seed(splits, options.recipe, options.output / f"seed-{seed}", seed, student_training)
        for seed in range(options.seeds)
    ]
    demo_summary.write(runs, options.output)


if __name__ == "__main__":
    try:
        main()
    except CompressionError as error:
        raise SystemExit(f"error: {error}") from error
