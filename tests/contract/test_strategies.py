"""Every strategy of distillation with quantization, in every order: save, resume, convert."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toys
from compression_manager import CompressionManager, prepare_compression
from compression_manager.deploy import load
from compression_plugins import (
    AdaptiveSchedule,
    CheckpointConfig,
    CosineSchedule,
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    QATConfig,
    QuantizedTeacher,
    SelfKnowledgeDistillationLossConfig,
    TokenDistillationLossConfig,
)

ORDERS = list(itertools.permutations(("distillation", "qat", "checkpoint")))
EPOCHS, STEPS, MIDDLE = 2, 3, 2


class TokenModel(nn.Module):
    """Input (N, 1, 8, 8) read as 8 tokens of 8 features; output (N, 8, 4)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, width)
        self.head = nn.Linear(width, toys.CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(input.squeeze(1))))


Distillers = Callable[[nn.Module], list[DistillationConfig]]


def logits(loss: str, temperature: Any = 4.0, **options: Any) -> Distillers:
    criterion = KnowledgeDistillationLossConfig(temperature, ("CE", loss), loss_options=options)
    return lambda teacher: [DistillationConfig(teacher, criterion)]


def layers(loss: str, *mappings: Any) -> Distillers:
    criterion = IntermediateLayersKnowledgeDistillationLossConfig(
        list(mappings or ("conv1", "conv2")), loss
    )
    return lambda teacher: [DistillationConfig(teacher, criterion)]


def two_with_one_teacher(teacher: nn.Module) -> list[DistillationConfig]:
    soft = KnowledgeDistillationLossConfig(
        CosineSchedule(8.0, 2.0, 4), ("CE", "KL"), (1.0, CosineSchedule(1.0, 0.0, 4))
    )
    hint = IntermediateLayersKnowledgeDistillationLossConfig(["conv*"])
    return [DistillationConfig(teacher, soft), DistillationConfig(teacher, hint, name="hint")]


STRATEGIES: dict[str, Distillers] = {
    **{name: logits(name) for name in ("CE", "KL", "MSE", "DIST", "reverse_KL", "JS")},
    "DKD": logits("DKD", alpha=1.0, beta=4.0),
    "label smoothing": logits("KL", label_smoothing=0.1),
    "adaptive temperature": logits("KL", AdaptiveSchedule(2.0, 6.0, "entropy")),
    "contrastive": layers("contrastive", ""),
    **{
        name: layers(name)
        for name in (
            "L1",
            "attention_transfer",
            "similarity_preserving",
            "rkd_distance",
            "rkd_angle",
        )
    },
    "hint": layers("MSE"),
    "two": two_with_one_teacher,
    "self": lambda teacher: [
        DistillationConfig(
            criterion=SelfKnowledgeDistillationLossConfig(
                [[["conv1", "conv2"]]], loss_types="attention_transfer"
            )
        )
    ],
    "moving average": lambda teacher: [
        DistillationConfig(
            teacher_outputs="ema",
            ema_decay=0.5,
            criterion=KnowledgeDistillationLossConfig(2.0, ("CE", "KL")),
        )
    ],
    "quantized teacher": lambda teacher: [
        DistillationConfig(
            QuantizedTeacher(teacher, dynamic=True, weights=True),
            KnowledgeDistillationLossConfig(4.0, ("CE", "KL")),
        )
    ],
    "tokens": lambda teacher: [
        DistillationConfig(teacher, TokenDistillationLossConfig("jensen_shannon", chunk_size=2))
    ],
}


class Result(NamedTuple):
    losses: list[float]
    state: dict[str, Any]
    converted: Tensor


class Run:
    """One training from a common start; `resume` continues it from the middle in a new model."""

    def __init__(self, strategy: str, order: tuple[str, ...], folder: Path) -> None:
        self._tokens = strategy == "tokens"
        torch.manual_seed(0)
        kind = TokenModel if self._tokens else toys.ConvNet
        teacher = kind(6)
        self.model = kind(4)
        checkpoint = CheckpointConfig(folder, save_every_steps=MIDDLE, keep_last=EPOCHS * STEPS)
        plugins = {
            "distillation": STRATEGIES[strategy](teacher),
            "qat": [QATConfig()],
            "checkpoint": [checkpoint],
        }
        listed = [config for name in order for config in plugins[name]]
        self.manager: CompressionManager = prepare_compression(self.model, listed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        self.manager.track(optimizer=self.optimizer)
        self.losses: list[float] = []

    def train(self) -> Run:
        manager = self.manager
        for _ in manager.epochs(EPOCHS):
            for _, (inputs, labels) in manager.steps(toys.loader(toys.images(8 * STEPS))):
                output = manager.model(inputs)
                if self._tokens:
                    labels = labels.unsqueeze(1).expand(-1, 8)
                    counted = {"mask": torch.arange(8) <= labels, "target": labels}
                else:
                    counted = {"target": labels}
                task = F.cross_entropy(output.flatten(0, -2), labels.flatten())
                loss = manager.on_after_compute_loss(inputs, output, task, **counted)
                loss.backward()
                manager.on_before_optimizer_step()
                self.optimizer.step()
                manager.on_after_optimizer_step()
                self.optimizer.zero_grad()
                self.losses.append(loss.item())
        return self

    def result(self) -> Result:
        state = copy.deepcopy(self.manager.state_dict())
        inputs = toys.images(16, seed=7).tensors[0]
        compared = {key: state[key] for key in ("model", "tracked")}
        return Result(self.losses, compared, self.manager.convert()(inputs))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_order_trains_resumes_and_converts_alike(strategy: str, tmp_path: Path) -> None:
    results = []
    for order in ORDERS:
        folder = tmp_path / "-".join(order)
        whole = Run(strategy, order, folder).train()
        results.append(whole.result())
        toys.assert_identical(results[-1], results[0])
        resumed = Run(strategy, order, folder)
        torch.manual_seed(5)
        resumed.manager.resume(folder / f"step-{MIDDLE:08d}")
        resumed.train()
        assert resumed.losses == whole.losses[MIDDLE:]
        toys.assert_identical(resumed.manager.state_dict(), whole.manager.state_dict())
    losses = results[0].losses
    assert len(set(losses)) == EPOCHS * STEPS
    directory = whole.manager.save_converted(tmp_path / "int8")
    fresh = TokenModel(4) if strategy == "tokens" else toys.ConvNet(4)
    served = load(directory, fresh)
    assert torch.equal(served(toys.images(16, seed=7).tensors[0]), results[0].converted)
    kept = {name.partition(".")[0] for name in served.state_dict()}
    assert kept <= {name for name, _ in whole.model.named_children()}
    assert "Projection" not in str(served)
    whole.manager.close()
    assert not any(module._forward_hooks for module in whole.model.modules())
    assert len(whole.optimizer.param_groups) == 1


def test_strategies_differ(tmp_path: Path) -> None:
    """Each strategy takes part: no two trainings of the convolutional student are alike."""
    order = ORDERS[0]
    ends = {
        name: Run(name, order, tmp_path / name).train().losses[-1]
        for name in STRATEGIES
        if name != "tokens"
    }
    assert len(set(ends.values())) == len(ends)
