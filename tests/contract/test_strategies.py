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
    CurriculumSchedule,
    DistillationConfig,
    EnsembleTeacher,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    LinearSchedule,
    QATConfig,
    QuantizedTeacher,
    SelfKnowledgeDistillationLossConfig,
    TokenDistillationLossConfig,
)
from compression_plugins.distillation.config import SOURCES
from compression_plugins.distillation.criteria import CRITERIA
from compression_plugins.distillation.criteria.catalog import CATALOG
from compression_plugins.distillation.criteria.schedules import SCHEDULES
from compression_plugins.distillation.criteria.tokens import DIVERGENCES
from compression_plugins.distillation.teachers.ensemble import COMBINATIONS

ORDERS = list(itertools.permutations(("distillation", "qat", "checkpoint")))
EPOCHS, STEPS, MIDDLE = 2, 3, 4  # one save, in the middle of the second epoch


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


def tokens(divergence: str, **options: Any) -> Distillers:
    criterion = TokenDistillationLossConfig(divergence, **options)
    return lambda teacher: [DistillationConfig(teacher, criterion)]


def ensemble(mode: str) -> Distillers:
    def distillers(teacher: nn.Module) -> list[DistillationConfig]:
        weights = [2.0, 1.0] if mode in ("average", "geometric") else None
        both = EnsembleTeacher([teacher, toys.ConvNet(5)], weights, mode)
        return [DistillationConfig(both, KnowledgeDistillationLossConfig(4.0, ("CE", "KL")))]

    return distillers


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
    "linear temperature": logits("KL", LinearSchedule(8.0, 2.0, 4)),
    "weight in stages": lambda teacher: [
        DistillationConfig(
            teacher,
            KnowledgeDistillationLossConfig(
                4.0, ("CE", "KL"), (0.5, CurriculumSchedule([2.0, 1.0, 0.5], [1, 3]))
            ),
        )
    ],
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
    "outputs of the loop": lambda teacher: [
        DistillationConfig(
            teacher_outputs="caller", criterion=KnowledgeDistillationLossConfig(3.0, ("CE", "KL"))
        )
    ],
    **{f"ensemble, {mode}": ensemble(mode) for mode in COMBINATIONS},
    "quantized teacher": lambda teacher: [
        DistillationConfig(
            QuantizedTeacher(teacher, dynamic=True, weights=True),
            KnowledgeDistillationLossConfig(4.0, ("CE", "KL")),
        )
    ],
    "tokens, forward": tokens("forward_kl"),
    "tokens, reverse": tokens("reverse_kl", temperature=2.0),
    "tokens, Jensen-Shannon": tokens("jensen_shannon", chunk_size=2),
}


class Result(NamedTuple):
    losses: list[float]
    state: dict[str, Any]
    converted: Tensor


class Run:
    """One training from a common start; `resume` continues it from the middle in a new model."""

    def __init__(self, strategy: str, order: tuple[str, ...], folder: Path) -> None:
        self._tokens = strategy.startswith("tokens")
        torch.manual_seed(0)
        kind = TokenModel if self._tokens else toys.ConvNet
        teacher = kind(6)
        self.model = kind(4)
        self._asked_by_loop = teacher.eval() if strategy == "outputs of the loop" else None
        checkpoint = CheckpointConfig(folder, save_every_epochs=EPOCHS + 1, save_every_steps=MIDDLE)
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
                said = None if self._asked_by_loop is None else self._asked_by_loop(inputs)
                loss = manager.on_after_compute_loss(inputs, output, task, said, **counted)
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
    fresh = TokenModel(4) if strategy.startswith("tokens") else toys.ConvNet(4)
    served = load(directory, fresh)
    assert torch.equal(served(toys.images(16, seed=7).tensors[0]), results[0].converted)
    kept = {name.partition(".")[0] for name in served.state_dict()}
    assert kept <= {name for name, _ in whole.model.named_children()}
    assert "Projection" not in str(served)
    whole.manager.close()
    assert not any(module._forward_hooks for module in whole.model.modules())
    assert len(whole.optimizer.param_groups) == 1


def test_strategies_differ(tmp_path: Path) -> None:
    """Each strategy takes part: no two trainings are alike."""
    order = ORDERS[0]
    ends = {
        name: Run(name, order, tmp_path / name).train().losses[-1]
        for name in STRATEGIES
        if name != "ensemble, median"  # Of two teachers it is their mean.
    }
    assert len(set(ends.values())) == len(ends)


def _schedules(value: Any) -> set[type]:
    values = value if isinstance(value, tuple) else (value,)
    return {type(item) for item in values if type(item) in SCHEDULES.values()}


def test_every_name_that_configs_take_is_a_strategy() -> None:
    configs = [item for make in STRATEGIES.values() for item in make(toys.ConvNet(6))]
    criteria = [config.criterion for config in configs]
    losses: set[str] = set()
    for criterion in criteria:
        types = getattr(criterion, "loss_types", ())
        losses |= {types} if isinstance(types, str) else set(types[-1:])
    assert losses == set(CATALOG)
    assert {type(criterion) for criterion in criteria} == set(CRITERIA.values())
    assert {config.teacher_outputs for config in configs} == set(SOURCES)
    divergences = {getattr(criterion, "divergence", None) for criterion in criteria}
    assert divergences - {None} == set(DIVERGENCES)
    schedules = [
        _schedules(getattr(criterion, name, None))
        for criterion in criteria
        for name in ("temperature", "loss_weights")
    ]
    assert set().union(*schedules) == set(SCHEDULES.values())
