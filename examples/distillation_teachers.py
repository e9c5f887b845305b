"""The distillation study's images, its teachers, and what they say to the images."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import distill_and_quantize as demo
import fashion_mnist
from compression_plugins import EnsembleTeacher, QuantizedTeacher, TeacherRuntime
from compression_plugins.distillation.teachers.runtime import running_teacher
from distillation_strategies import BLOCKS, FEATURES
from fashion_mnist import Split, Splits

RECIPE = Path(__file__).parent / "recipes" / "distill_and_quantize.yaml"
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


def is_recorded(setup: Setup, seed: int, forms: Collection[str]) -> bool:
    """Return whether a seed's teacher was recorded, and the asked ones of its `FORMS`."""
    folder = teacher_folder(setup, seed)
    files = (folder / f"{form}_logits.npy" for form in forms)
    return (folder / "recorded").exists() and all(file.exists() for file in files)


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
def record_teacher(setup: Setup, seed: int, forms: Collection[str]) -> None:
    """Write down what the teacher says to every variant, and what the asked ones of `FORMS` say."""
    folder = teacher_folder(setup, seed)
    (folder / "recorded").unlink(missing_ok=True)
    teacher = load_teacher(setup, seed)
    outputs: dict[str, Tensor] = {}
    for name in (*BLOCKS, FEATURES):
        teacher.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
    others = {form: FORMS[form](setup, seed) for form in forms}
    images = variants(setup)
    files: dict[str, Any] = {}
    for start in range(0, len(images), 500):
        batch = images[start : start + 500]
        outputs["logits"] = teacher(batch)
        outputs |= {f"{form}_logits": other(batch) for form, other in others.items()}
        for name, output in outputs.items():
            if name not in files:
                files[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", "w+", np.float32, (len(images), *output.shape[1:])
                )
            files[name][start : start + 500] = output.numpy()
    for file in files.values():
        file.flush()
    (folder / "recorded").touch()


def _int8(setup: Setup, seed: int) -> nn.Module:
    return QuantizedTeacher(load_teacher(setup, seed), weights=True, dynamic=True)


def _bfloat16(setup: Setup, seed: int) -> nn.Module:
    return running_teacher(load_teacher(setup, seed), TeacherRuntime(precision="bfloat16"))


def _ensemble(setup: Setup, seed: int) -> nn.Module:
    return EnsembleTeacher([load_teacher(setup, seed + other) for other in (0, SECOND_TEACHER)])


# What else a student may learn from, by the source of its strategy.
FORMS = {"int8": _int8, "bfloat16": _bfloat16, "ensemble": _ensemble}
