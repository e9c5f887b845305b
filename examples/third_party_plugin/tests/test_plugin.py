"""The plugin in training: zeros stay zero, and come through quantization and conversion."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from compression_magnitude_pruning import MagnitudePruningConfig
from torch import Tensor, nn

from compression_manager import (
    CheckpointMismatchError,
    CompressionManager,
    ConfigError,
    LifecycleError,
    Metric,
    Plugin,
    PluginConfig,
    StartAt,
    deploy,
    hookimpl,
    prepare_compression,
)
from compression_manager.quantization import QuantizationScheme
from compression_plugins import QATConfig

STEPS = 8
RAMP = MagnitudePruningConfig(0.75, start=StartAt(step=1), end=StartAt(step=5))
BATCH = (torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))


def nothing(training: Training) -> None:
    """Stand for what happens between the optimizer's step and the hook after it."""


@dataclass
class Training:
    """A model in training with momentum and weight decay, which move weights that are zero."""

    manager: CompressionManager
    optimizer: torch.optim.Optimizer
    between: Callable[[Training], None] = nothing

    @classmethod
    def start(cls, *configs: Any, model: nn.Module | None = None) -> Training:
        manager = prepare_compression(model or mlp(), configs)
        parameters = manager.model.parameters()
        optimizer = torch.optim.SGD(parameters, 0.3, momentum=0.9, weight_decay=0.1)
        manager.track(optimizer=optimizer)
        return cls(manager, optimizer)

    @property
    def weights(self) -> list[Tensor]:
        return [value.detach() for value in self.manager.model.parameters() if value.dim() == 2]

    def zeros(self) -> list[Tensor]:
        return [weight == 0 for weight in self.weights]

    def count(self) -> list[int]:
        return [int(zero.sum()) for zero in self.zeros()]

    def steps(self, epochs: int = 1) -> Iterator[int]:
        """Train, and yield after each optimizer step."""
        inputs, targets = BATCH
        for _ in self.manager.epochs(epochs):
            for step, _ in self.manager.steps([BATCH] * STEPS):
                output = self.manager.model(inputs)
                loss = F.cross_entropy(output, targets)
                self.manager.on_after_compute_loss(inputs, output, loss).backward()
                self.manager.on_before_optimizer_step()
                self.optimizer.step()
                self.between(self)
                self.manager.on_after_optimizer_step()
                self.optimizer.zero_grad()
                yield step

    def run(self, epochs: int = 1) -> Training:
        for _ in self.steps(epochs):
            pass
        return self


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_zeros_follow_the_schedule_and_never_come_back(scope: Any) -> None:
    training = Training.start(dataclasses.replace(RAMP, scope=scope))
    before = training.zeros()
    for step in training.steps():
        share = RAMP.sparsity_at(step=step + 1, epoch=0)
        if scope == "layer":
            assert training.count() == [round(60 * share), round(40 * share)]
        assert sum(training.count()) == pytest.approx(100 * share, abs=1)
        for weight, was_zero in zip(training.weights, before, strict=True):
            assert not weight[was_zero].any()
        before = training.zeros()
    assert all(
        bool(value.all()) for value in training.manager.model.parameters() if value.dim() < 2
    )


def test_optimizer_moves_pruned_weights_though_they_get_no_gradient() -> None:
    """Momentum from before the pruning does; else the test above would be of nothing."""
    training = Training.start(RAMP)
    pruned = training.zeros()
    moved = []

    def watch(training: Training) -> None:
        layers = [training.manager.model[0], training.manager.model[2]]
        for layer, zero in zip(layers, pruned, strict=True):
            assert not layer.weight.grad[zero].any()
            moved.append(bool(layer.weight.detach()[zero].any()))

    training.between = watch
    for _ in training.steps():
        pruned[:] = training.zeros()
    assert any(moved)


def test_all_at_once_is_pruned_before_the_first_batch() -> None:
    training = Training.start(MagnitudePruningConfig(0.5))
    training.manager.on_train_begin()
    for weight, original in zip(training.weights, (mlp()[0].weight, mlp()[2].weight), strict=True):
        assert torch.equal(weight != 0, original.abs() > original.abs().median())


def test_global_scope_compares_layers() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight.add_(10)
    training = Training.start(MagnitudePruningConfig(0.4, scope="global"), model=model)
    training.manager.on_train_begin()
    assert training.count() == [0, 40]


def test_schedule_in_epochs() -> None:
    config = MagnitudePruningConfig(0.5, start=StartAt(epoch=1), end=StartAt(epoch=3))
    training = Training.start(config)
    found = [training.count()[0] for _ in training.steps(4)]
    expected = [0, 0, round(60 * (0.5 - 0.5 * 0.5**3)), 30]
    assert found == [count for count in expected for _ in range(STEPS)]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(self.second(self.first(input).relu()).relu())


@pytest.mark.parametrize("others", [[], [QATConfig()]], ids=["alone", "with qat"])
def test_shared_weight_is_pruned_once(others: list[Any]) -> None:
    training = Training.start(*others, dataclasses.replace(RAMP, exclude=("last.*",)), model=Tied())
    training.run()
    assert training.count() == [27, 0]
    converted = training.manager.convert(BATCH[0])
    for layer in (converted.first, converted.second):
        assert int((layer.weight == 0).sum()) >= 27


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("first", ["pruning", "qat"])
def test_zeros_are_zeros_of_the_integer_grid(symmetric: bool, first: str) -> None:
    scheme = QuantizationScheme(bits=4, symmetric=symmetric, granularity="channel", axis=0)
    configs = [dataclasses.replace(RAMP, sparsity=0.5), QATConfig(weight=scheme)]
    training = Training.start(*(configs if first == "pruning" else configs[::-1])).run()
    zeros = training.zeros()
    assert training.count() == [30, 20]
    converted = training.manager.convert()
    for layer, zero in zip((converted[0], converted[2]), zeros, strict=True):
        values = layer.float_weight(torch.float32)
        assert not values[zero].any()
        assert values[~zero].any()
    assert (
        converted.state_dict().keys()
        == Training.start(QATConfig(weight=scheme)).run().manager.convert().state_dict().keys()
    )


def test_pruning_alone_converts_to_a_float_model_without_masks(tmp_path: Path) -> None:
    training = Training.start(RAMP).run()
    converted = training.manager.convert()
    assert not converted.training
    assert converted.state_dict().keys() == mlp().state_dict().keys()
    assert all(map(torch.equal, converted.parameters(), training.manager.model.parameters()))
    loaded = deploy.load(training.manager.save_converted(tmp_path / "converted"), mlp())
    assert torch.equal(loaded(BATCH[0]), converted(BATCH[0]))
    assert "75 of 100 weights are zero" in str(training.manager.report())


@pytest.mark.parametrize("stop", [1, 3, STEPS, STEPS + 2])  # on the ramp, between epochs, after it
def test_resumed_run_is_identical(stop: int) -> None:
    expected = Training.start(RAMP, QATConfig()).run(2).manager.state_dict()
    stopped = Training.start(RAMP, QATConfig())
    for count, _ in enumerate(stopped.steps(2), start=1):
        if count == stop:
            state = copy.deepcopy(stopped.manager.state_dict())
            break
    resumed = Training.start(RAMP, QATConfig())
    resumed.manager.load_state_dict(state)
    actual = resumed.run(2).manager.state_dict()
    for part in ("model", "plugins", "tracked"):
        assert_equal(actual[part], expected[part])


def assert_equal(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal(actual[key], expected[key])
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


def test_lower_sparsity_after_resuming_brings_nothing_back() -> None:
    state = copy.deepcopy(Training.start(RAMP).run().manager.state_dict())
    resumed = Training.start(dataclasses.replace(RAMP, sparsity=0.5))
    resumed.manager.load_state_dict(state)
    assert resumed.run(2).count() == [45, 30]


def test_masks_of_other_weights_are_refused() -> None:
    state = Training.start(RAMP).run().manager.state_dict()
    other = Training.start(dataclasses.replace(RAMP, include=("0.*",)))
    with pytest.raises(CheckpointMismatchError, match=r"prunes 0\.weight, but .* 2\.weight"):
        other.manager.load_state_dict(state)


@dataclass(frozen=True)
class SinkConfig(PluginConfig):
    plugin: ClassVar[str] = "sink"
    metrics: list[Metric] = field(default_factory=list)


class Sink(Plugin[SinkConfig]):
    config_class = SinkConfig

    @hookimpl
    def consume_metrics(self, metrics: Sequence[Metric]) -> None:
        self.config.metrics.extend(metrics)


def test_sparsity_is_published_whenever_it_changes() -> None:
    sink = SinkConfig()
    Training.start(RAMP, Sink(sink)).run()
    found = {
        name: [item.as_float() for item in sink.metrics if item.name == name]
        for name in {item.name for item in sink.metrics}
        if name.startswith("magnitude_pruning/")
    }
    shares = [RAMP.sparsity_at(step=step, epoch=0) for step in (2, 3, 4, 5)]
    first, second = ([round(share * n) for share in shares] for n in (60, 40))
    assert found == {
        "magnitude_pruning/sparsity/0.weight": pytest.approx([n / 60 for n in first]),
        "magnitude_pruning/sparsity/2.weight": pytest.approx([n / 40 for n in second]),
        "magnitude_pruning/sparsity": pytest.approx(
            [(a + b) / 100 for a, b in zip(first, second, strict=True)]
        ),
    }


def test_loop_without_the_hook_after_the_step_is_refused() -> None:
    manager = prepare_compression(mlp(), [RAMP])
    manager.on_train_begin()
    manager.on_step_begin(0)
    output = manager.model(BATCH[0])
    manager.on_after_compute_loss(BATCH[0], output, output.sum())
    manager.on_before_optimizer_step()
    with pytest.raises(LifecycleError, match="'magnitude_pruning' needs on_after_optimizer_step"):
        manager.on_step_end()


def test_recipe_names_the_option_at_fault(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("plugins: {magnitude_pruning: {include: ['2.weigth'], end: {step: 9}}}")
    with pytest.raises(ConfigError, match=r"magnitude_pruning\.include\[0\]: .*mean '2\.weight'"):
        prepare_compression(mlp(), recipe)


def test_closing_leaves_no_trace_but_the_weights() -> None:
    training = Training.start(RAMP).run()
    training.manager.close()
    model = training.manager.model
    assert model.state_dict().keys() == mlp().state_dict().keys()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)
    assert training.count() == [45, 30]


def test_weights_that_a_plugin_puts_back_in_the_end_are_pruned() -> None:
    """A trainer returns those of its best epoch, which may have been before the pruning."""
    training = Training.start(RAMP)
    model = training.manager.model
    before = copy.deepcopy(model.state_dict())
    for step in training.steps():
        if step == STEPS - 1:
            model.load_state_dict(before)
            assert training.count() == [0, 0]
    assert training.count() == [45, 30]
