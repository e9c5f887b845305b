"""BatchNorm statistics after training are the averages over batches, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import toys
from compression_manager import ConfigError, PluginError, StartAt, prepare_compression
from compression_plugins import BatchNormReestimationConfig, QATConfig


def recording(model: nn.Module) -> dict[str, list[Any]]:
    """Return what each BatchNorm gets from now on, as float64 arrays of (batch, channels, ...)."""
    seen: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            values = seen.setdefault(name, [])
            module.register_forward_pre_hook(
                lambda module, args, values=values: values.append(args[0].detach().double().numpy())
            )
    return seen


def statistics(values: list[Any]) -> tuple[Any, Any]:
    """Return the averages of the batches' means and unbiased variances."""
    means = [value.mean((0, 2, 3)) for value in values]
    variances = [value.var((0, 2, 3), ddof=1) for value in values]
    return np.mean(means, axis=0), np.mean(variances, axis=0)


def prepared(model: nn.Module, *configs: Any, loader: Any) -> tuple[Any, Any]:
    manager = prepare_compression(model, list(configs))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    manager.track(optimizer=optimizer, dataloader=loader)
    return manager, optimizer


def run(manager: Any, optimizer: Any, loader: Any, seen: dict[str, list[Any]]) -> Any:
    """Train two epochs by hand; return the state right before the end."""
    manager.on_train_begin()
    for epoch in range(2):
        manager.on_epoch_begin(epoch)
        manager.model.train()
        for step, (inputs, targets) in enumerate(loader):
            manager.on_step_begin(step)
            output = manager.model(inputs)
            loss = nn.functional.cross_entropy(output, targets)
            manager.on_after_compute_loss(inputs, output, loss).backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            optimizer.zero_grad()
            manager.on_step_end()
        manager.on_epoch_end()
    for values in seen.values():
        values.clear()
    before = copy.deepcopy(manager.state_dict())
    manager.on_train_end()
    return before


@pytest.mark.parametrize("batches", [3, 100])
@pytest.mark.parametrize("frozen", [False, True])
def test_average_of_batch_statistics_and_all_else_as_before(batches: int, frozen: bool) -> None:
    torch.manual_seed(0)
    model = toys.ConvNet(dropout=0.5)
    # 36 images: the last of 5 batches is smaller and counts as much.
    loader = DataLoader(toys.images(36), 8, shuffle=True, generator=torch.Generator())
    qat = QATConfig(freeze_batch_norm_at=StartAt(epoch=1) if frozen else None)
    manager, optimizer = prepared(model, qat, BatchNormReestimationConfig(batches), loader=loader)
    momenta = [model.bn1.momentum, model.bn2.momentum]
    seen = recording(model)
    before = run(manager, optimizer, loader, seen)
    count = min(batches, 5)
    for name, values in seen.items():
        layer = model.get_submodule(name)
        assert len(values) == count
        mean, variance = statistics(values)
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.running_var.numpy(), variance, rtol=1e-5)
        assert not np.allclose(layer.running_mean.numpy(), before["model"][f"{name}.running_mean"])
        assert layer.num_batches_tracked.item() == count
    if batches == 100:
        assert [len(value) for value in seen["bn1"]] == [8, 8, 8, 8, 4]
    assert [model.bn1.momentum, model.bn2.momentum] == momenta
    assert model.training
    assert model.bn1.training is model.bn2.training is not frozen
    assert model.fc.training
    after = manager.state_dict()
    for state in (before, after):
        for name in seen:
            for key in ("running_mean", "running_var", "num_batches_tracked"):
                del state["model"][f"{name}.{key}"]
    toys.assert_identical(after, before)


def test_the_batches_pass_through_the_quantized_model() -> None:
    torch.manual_seed(0)
    model = toys.ConvNet()
    loader = [tuple(toys.images(16).tensors)]
    manager, optimizer = prepared(model, QATConfig(), BatchNormReestimationConfig(), loader=loader)
    seen = recording(model)
    run(manager, optimizer, loader, seen)
    quantized = model.eval()
    with torch.no_grad():
        expected = quantized.conv1(loader[0][0]).double().numpy()
    np.testing.assert_array_equal(seen["bn1"][0], expected)
    # With one batch, evaluation normalizes as training did, but for the unbiased variance.
    with torch.no_grad():
        evaluated = model.bn1(torch.tensor(expected, dtype=torch.float32))
    assert (evaluated.mean((0, 2, 3)) - model.bn1.bias).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["mapping", "tensor", "tuple", "function"])
def test_what_the_model_is_called_with(kind: str) -> None:
    images = torch.randn(4, 1, 8, 8)
    seen: list[Any] = []

    class Model(toys.ConvNet):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(input)
            return super().forward(input)

    batch = {
        "mapping": {"input": images, "labels": torch.zeros(4)},
        "tensor": images,
        "tuple": (images, torch.zeros(4)),
        "function": [torch.zeros(4), images],
    }[kind]
    get_inputs = (lambda batch: batch[1]) if kind == "function" else None
    config = BatchNormReestimationConfig(dataloader=[batch], get_inputs=get_inputs)
    manager = prepare_compression(Model(), [config])
    manager.on_train_begin()
    manager.on_train_end()
    assert len(seen) == 1
    assert torch.equal(seen[0], images)


def test_a_loader_is_required_at_the_beginning() -> None:
    for loader, text in (
        (None, r"needs the training batches.*track\(dataloader=loader\)"),
        (iter([1]), "yields its batches once"),
    ):
        manager = prepare_compression(toys.ConvNet(), [BatchNormReestimationConfig()])
        with pytest.raises(ConfigError, match=text):
            manager.on_train_begin(loader)
        manager.on_train_begin([torch.randn(2, 1, 8, 8)])
        manager.on_train_end()


def test_its_own_loader_comes_before_the_tracked_one() -> None:
    model = toys.ConvNet()
    own = [torch.randn(4, 1, 8, 8)]
    manager = prepare_compression(model, [BatchNormReestimationConfig(dataloader=own)])
    seen = recording(model)
    manager.on_train_begin([torch.randn(2, 1, 8, 8)])
    manager.on_train_end()
    assert [len(value) for value in seen["bn1"]] == [4]


class Unsized:
    """A loader of unknown length that turns out to be empty."""

    def __iter__(self) -> Any:
        return iter(())


def test_a_loader_that_is_known_to_be_empty_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="the list holds no batch"):
        prepare_compression(
            toys.ConvNet(), [BatchNormReestimationConfig(dataloader=[])]
        ).on_train_begin()


def test_failures_leave_the_statistics_of_training() -> None:
    unusable = [torch.randn(4, 1, 8, 8), "no batch"]
    for batches, error in ((Unsized(), ConfigError), (unusable, PluginError)):
        model = toys.ConvNet().eval()
        manager = prepare_compression(model, [BatchNormReestimationConfig(dataloader=batches)])
        with torch.no_grad():
            model.bn1.running_mean.fill_(3.0)
        before = copy.deepcopy(model.state_dict())
        manager.on_train_begin()
        with pytest.raises(error, match="batch_norm_reestimation"):
            manager.on_train_end()
        toys.assert_identical(dict(model.state_dict()), dict(before))
        assert model.bn1.momentum == 0.1
        assert not model.bn1.training
        assert not model.bn1._forward_pre_hooks


class Counting:
    """A loader that keeps its position, as torchdata's do."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Any:
        for _ in range(3):
            self.position += 1
            yield torch.randn(4, 1, 8, 8)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def test_a_loader_with_a_position_gets_it_back() -> None:
    loader = Counting()
    manager = prepare_compression(toys.ConvNet(), [BatchNormReestimationConfig()])
    manager.on_train_begin(loader)
    manager.on_train_end()
    assert loader.position == 0


def test_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no BatchNorm layer"):
        prepare_compression(toys.mlp(), [BatchNormReestimationConfig()])
    without = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ConfigError, match="found no BatchNorm layer with running statistics"):
        prepare_compression(without, [BatchNormReestimationConfig()])
    for options, text in (
        ({"batches": 0}, "batches must be an integer of at least 1"),
        ({"dataloader": 3}, "dataloader must be an iterable of batches, got int"),
        ({"dataloader": iter([1])}, "yields its batches once"),
        ({"get_inputs": 1}, "get_inputs must be a function of a batch, got int"),
    ):
        with pytest.raises(ConfigError, match=text):
            BatchNormReestimationConfig(**options)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("plugins:\n  batch_norm_reestimation: {batches: 2}\n")
    manager = prepare_compression(toys.ConvNet(), recipe, dataloader=[torch.randn(2, 1, 8, 8)])
    manager.on_train_begin()
    manager.on_train_end()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        manager = prepare_compression(toys.ConvNet(), [BatchNormReestimationConfig(2)])
        manager.on_train_begin([torch.randn(2, 1, 8, 8)] * 3)
        manager.on_train_end()
        assert ("BatchNorm statistics" in stream.getvalue()) is shown
        assert ("/2" in stream.getvalue()) is shown
