"""Training runs on disk, and pages about them, for the tests of `report` and `compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import CompressionManager, prepare_compression
from compression_manager.report import Report
from compression_plugins import (
    CheckpointConfig,
    DistillationConfig,
    KnowledgeDistillationLossConfig,
    QATConfig,
    TensorBoardConfig,
)

ACCURACIES = (0.25, 0.75, 0.5)
STEPS_PER_EPOCH = 4


@dataclass
class Written:
    """What a run was, as its own loop saw it."""

    folder: Path
    losses: list[float] = field(default_factory=list)
    report: Report | None = None
    layers: dict[str, Any] = field(default_factory=dict)


def write_run(
    folder: Path,
    *,
    temperature: float = 4.0,
    tensorboard: bool = True,
    checkpoint: bool = True,
    accuracies: tuple[float, ...] = ACCURACIES,
    metric: str = "accuracy",
    model: nn.Module | None = None,
) -> Written:
    """Distil and quantize a tiny network, an epoch for each accuracy."""
    torch.manual_seed(0)
    written = Written(folder)
    student = toys.mlp() if model is None else model
    criterion = KnowledgeDistillationLossConfig(
        temperature=temperature, loss_types=["CE", "KL"], loss_weights=[0.5, 0.5]
    )
    configs: list[Any] = [DistillationConfig(teacher_model=toys.mlp(), criterion=criterion)]
    configs += [QATConfig()]
    if checkpoint:
        configs.append(CheckpointConfig(folder / "checkpoints", metric=metric, keep_last=9))
    if tensorboard:
        configs.append(TensorBoardConfig(folder / "tensorboard", detail_every_steps=1))
    with prepare_compression(student, configs, seed=5) as manager:
        _train(manager, written, accuracies, metric)
        written.report = manager.report()
    return written


def _train(
    manager: CompressionManager, written: Written, accuracies: tuple[float, ...], metric: str
) -> None:
    model = manager.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager.track(optimizer=optimizer)
    batches = toys.loader(toys.vectors(8 * STEPS_PER_EPOCH))
    for epoch in manager.epochs(len(accuracies)):
        for _, (inputs, targets) in manager.steps(batches):
            output = model(inputs)
            loss = F.cross_entropy(output, targets)
            total = manager.on_after_compute_loss(inputs, output, loss, target=targets)
            total.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
            written.losses.append(float(total.detach()))
        manager.on_before_eval()
        manager.on_after_eval({metric: accuracies[epoch], "gap": float("nan")})


class Page(HTMLParser):
    """A parsed page; fails on tags that do not match.

    Attributes:
        tags: name and attributes of every start tag.
        texts: every piece of text outside of the style sheet.
    """

    _void = frozenset({"meta", "br", "img", "link", "hr", "input"})
    _svg_void = frozenset({"path", "circle", "rect", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._void:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self._svg_void, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open[-1:] != ["style"]:
            self.texts.append(data.strip())

    def after(self, label: str) -> str:
        """Return the piece of text that follows the first one that is `label`."""
        return self.texts[self.texts.index(label) + 1]
