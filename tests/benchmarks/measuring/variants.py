"""The ways to train quantization-aware that are compared with the float32 step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from compression_manager.plugin import PluginConfig
from compression_manager.quantization.integer import selection
from compression_plugins import (
    DistillationConfig,
    KnowledgeDistillationLossConfig,
    QATConfig,
    TeacherCache,
)
from measuring.machine import features
from measuring.models import Workload
from measuring.trainer import Trainer

BASELINE = "float32"
WITHOUT_INTEGERS = 1.30
"""The bar without VNNI, or for layers too small for the integer kernels."""


class Unavailable(Exception):
    """A variant cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        options: of `QATConfig`; None trains in float32, without a manager.
        passes: which implementation of the integer forward's passes: "torch" or "native".
        bars: workload -> the aim on a processor with VNNI.
        needs: names of processor features (see `measuring.machine.FEATURES`).
        distilled: whether a warm cache of teacher outputs is used as well.
    """

    name: str
    title: str
    options: dict[str, str] | None
    passes: str | None = None
    bars: dict[str, float] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    distilled: bool = False

    def bar(self, workload: str) -> float | None:
        """Return the largest ratio to the float32 step that is wanted, or None.

        Where the integer kernels gain nothing, another aim applies to what the rule chooses.
        """
        automatic = (self.options or {}).get("forward") == "auto"
        if workload not in SAVED_BARS or not features()["VNNI"]:
            return WITHOUT_INTEGERS if automatic and not self.distilled else None
        return self.bars.get(workload)


def _variant(name: str, title: str, passes: str, bars: dict[str, float], **more: Any) -> Variant:
    return Variant(name, title, {"forward": "auto", "backward": "float32"}, passes, bars, **more)


def _in_bfloat16(backward: str, instructions: str, bars: dict[str, float]) -> Variant:
    options = {"forward": "auto", "backward": backward}
    title = f"native, {backward} backward"
    return Variant(backward, title, options, "native", bars, needs=("VNNI", instructions))


FLOAT = Variant(BASELINE, "float32", None)
DISTILLED = {"encoder": 0.95, "resnet": 0.95}
VARIANTS = (
    Variant("fake", "fake-quant", {"forward": "fake"}),
    _variant("auto-torch", "torch ops", "torch", {"encoder": 0.95, "resnet": 0.97}),
    _variant("auto-native", "native", "native", {"encoder": 0.85, "resnet": 0.88}),
    _in_bfloat16("bfloat16x3", "AMX-bf16", {"encoder": 0.72}),
    _in_bfloat16("bfloat16", "AVX512-BF16", {"encoder": 0.50, "resnet": 0.50}),
    Variant("distilled-fake", "fake-quant, distilled", {"forward": "fake"}, distilled=True),
    _variant("distilled-torch", "torch ops, distilled", "torch", DISTILLED, distilled=True),
    _variant("distilled-native", "native, distilled", "native", DISTILLED, distilled=True),
)
"""Those without a name of their own for the forward let the rule choose, as users do by default."""

SAVED_BARS = {"encoder": 0.80, "resnet": 0.75}
"""Workload -> the largest ratio of saved activations, with the integer forward."""


class VariantTrainer:
    """Trains a fresh copy of a workload's model in one of the ways.

    Raises:
        Unavailable: the kernels or the processor's features are missing.
    """

    def __init__(self, variant: Variant, workload: Workload, cache: TeacherCache) -> None:
        self.variant, self._batches = variant, workload.batches
        self._passes = _find_passes(variant)
        with self.using():
            self.trainer = Trainer(workload.build(), _configs(variant, cache))

    def step(self, number: int) -> None:
        """Make one whole training step on the next batch."""
        with self.using():
            self.trainer.step(number, *self._batches[number % len(self._batches)])

    def loss(self, number: int) -> Tensor:
        """Make the forward half of a step."""
        with self.using():
            return self.trainer.loss(number, *self._batches[number % len(self._batches)])

    def update(self, loss: Tensor) -> None:
        """Make the other half of a step."""
        with self.using():
            self.trainer.update(loss)

    def using(self) -> AbstractContextManager[object]:
        """Return a context in which the variant's passes compute."""
        if self._passes is None:
            return contextlib.nullcontext()
        return selection.use_passes(self._passes)


def _configs(variant: Variant, cache: TeacherCache) -> Sequence[PluginConfig]:
    if variant.options is None:
        return ()
    qat = QATConfig(**variant.options)
    if not variant.distilled:
        return [qat]
    criterion = KnowledgeDistillationLossConfig(
        temperature=4.0, loss_types=("CE", "KL"), loss_weights=(0.5, 0.5)
    )
    return [DistillationConfig(teacher_cache=cache, criterion=criterion), qat]


def _find_passes(variant: Variant) -> Any:
    having = features()
    lacking = [name for name in variant.needs if not having[name]]
    if lacking:
        raise Unavailable(f"the processor has no {' and no '.join(lacking)}")
    if variant.passes is None:
        return None
    if variant.passes == "torch":
        return selection.TORCH
    reason = selection.prepare_native()
    if reason is not None:
        raise Unavailable(reason)
    return selection.active_passes()


class _Samples(Dataset[Any]):
    """The samples of a workload's batches: (inputs, targets, id)."""

    def __init__(self, workload: Workload) -> None:
        self._batches, self._size = workload.batches, len(workload.inputs)

    def __len__(self) -> int:
        return self._size * len(self._batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        inputs, targets, _ = self._batches[index // self._size]
        return inputs[index % self._size], targets[index % self._size], index


def warm_cache(workload: Workload, folder: Path) -> TeacherCache:
    """Return a cache with the outputs of a network like the student, for every sample."""
    cache = TeacherCache(folder)
    cache.build(workload.build(), DataLoader(_Samples(workload), len(workload.inputs)))
    return cache
