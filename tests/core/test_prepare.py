"""`prepare_compression`: a failure leaves the model as it was; seeds; nothing drawn."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import toys
from compression_manager import ConfigError, PluginError, prepare_compression
from compression_manager.state import capture_random_state
from compression_plugins import DistillationConfig, LayerRule, QATConfig
from probes import probe
from rank_runs import process_group


def _snapshot(model: nn.Module) -> Any:
    return (
        {name: (id(value), value.clone()) for name, value in model.named_parameters()},
        copy.deepcopy(dict(model.named_buffers())),
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        list(model.state_dict()),
    )


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """A model, and its teacher, that must be untouched when the test is over."""
    model, teacher = toys.ConvNet(), toys.ConvNet(8)
    teacher.bn1.weight.requires_grad_(False)
    model.teacher_for_the_test = [teacher]
    before = _snapshot(model), _snapshot(teacher)
    yield model
    assert _same(before, (_snapshot(model), _snapshot(teacher)))


def _fail(self: Any) -> None:
    raise OSError("late")


def _interrupt(self: Any) -> None:
    raise KeyboardInterrupt


OTHER_CLASSES = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("unfit", "error"),
    [
        (lambda: probe("x", validate_composition=_fail), PluginError),
        (lambda: probe("x", prepare_model=_fail), PluginError),
        (lambda: probe("x", prepare_model=_interrupt), KeyboardInterrupt),
        (lambda: QATConfig(name="second"), ConfigError),
        (lambda: DistillationConfig(OTHER_CLASSES), ConfigError),
        (lambda: DistillationConfig(toys.ConvNet(), name="distillation"), ConfigError),
    ],
)
def test_failure_leaves_model_and_teacher_untouched(
    model: nn.Module, unfit: Any, error: type[BaseException], position: int
) -> None:
    teacher = model.teacher_for_the_test[0]
    configs = [QATConfig(), DistillationConfig(teacher, name="distillation")]
    configs.insert(position, unfit())
    with pytest.raises(error):
        prepare_compression(model, configs, example_inputs=torch.randn(2, 1, 8, 8))


def test_unmatched_rule_leaves_the_model_untouched(model: nn.Module) -> None:
    rule = LayerRule(layer="nothing", skip=True)
    with pytest.raises(ConfigError, match="nothing"):
        prepare_compression(model, [probe(), QATConfig(overrides=(rule,))])


def test_failing_cleanup_becomes_a_note() -> None:
    def prepare_model(self: Any, context: Any) -> None:
        context.add_cleanup(lambda: 1 / 0, owner=self.name)
        raise ConfigError("the reason")

    with pytest.raises(ConfigError, match="the reason") as error:
        prepare_compression(toys.mlp(), [probe("x", prepare_model=prepare_model)])
    assert any("'x' failed while closing" in note for note in error.value.__notes__)


@pytest.mark.parametrize("not_a_model", [None, 3, nn.Linear, {}, [nn.Linear(1, 1)]])
def test_model_that_is_no_module(not_a_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module as model, got"):
        prepare_compression(not_a_model, [QATConfig()])


def test_model_and_parameters_keep_their_identity() -> None:
    model = toys.ConvNet()
    parameters = list(model.parameters())
    manager = prepare_compression(model, [QATConfig()], example_inputs=torch.randn(2, 1, 8, 8))
    assert manager.model is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_example_inputs_draw_nothing_and_train_nothing() -> None:
    model = toys.ConvNet(dropout=0.5)
    inputs = torch.randn(2, 1, 8, 8)
    buffers = copy.deepcopy({n: b for n, b in model.named_buffers() if "bn" in n})
    configs = [QATConfig(), DistillationConfig(toys.ConvNet(8, dropout=0.5))]
    before = capture_random_state()
    prepare_compression(model, configs, example_inputs=inputs)
    after = capture_random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    now = dict(model.named_buffers())
    assert all(torch.equal(value, now[name]) for name, value in buffers.items())
    assert all(module.training for module in model.modules())


def _draws() -> tuple[Any, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seed_of_argument_and_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 7\nplugins: {qat: {}}\n")

    def drawn(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        prepare_compression(toys.mlp(), *arguments, **options)
        return _draws()

    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    seven = _draws()
    assert drawn([QATConfig()], seed=7) == seven
    assert drawn(recipe) == seven
    assert drawn(recipe, seed=8) != seven
    assert drawn(recipe, overrides=["seed=8"], seed=7) == seven
    model = toys.mlp()
    before = capture_random_state()["torch"]
    prepare_compression(model, [QATConfig()])
    assert torch.equal(before, capture_random_state()["torch"])


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "3", True])
def test_unfit_seed(seed: Any) -> None:
    model = toys.mlp()
    before = capture_random_state()["torch"]
    with pytest.raises(ConfigError, match="seed takes a whole number from 0"):
        prepare_compression(model, [QATConfig()], seed=seed)
    assert torch.equal(before, capture_random_state()["torch"])


def test_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"before DataParallel wraps it.*then wrap"):
        prepare_compression(nn.DataParallel(toys.mlp()), [QATConfig()])
    with process_group(tmp_path):
        wrapped = DistributedDataParallel(toys.mlp())
        with pytest.raises(ConfigError, match=r"before DistributedDataParallel wraps it"):
            prepare_compression(wrapped, [QATConfig()])
