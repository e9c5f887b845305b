"""Bad input gets one of the framework's errors and leaves the model and files as they were.

One test per entry of the list in the issue; details are tested beside each module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toys
from compression_manager import (
    CheckpointError,
    CompressionError,
    CompressionManager,
    ConfigError,
    LifecycleError,
    LossError,
    deploy,
    prepare_compression,
)
from compression_manager.quantization import QuantizationScheme
from compression_plugins import (
    CheckpointConfig,
    DistillationConfig,
    LayerRule,
    QATConfig,
)


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "classes": [type(module) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
    }


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """A model that must be untouched when the test is over."""
    model = toys.mlp()
    before = _snapshot(model)
    yield model
    after = _snapshot(model)
    assert all(torch.equal(before["state"][k], after["state"][k]) for k in before["state"])
    assert {k: v for k, v in before.items() if k != "state"} == {
        k: v for k, v in after.items() if k != "state"
    }


def _recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plugins: {qatt: {}}", ["qatt", "did you mean 'qat'"]),
        ("plugin: {qat: {}}", ["recipe.yaml", "plugins"]),
        ("plugins: {qat: {weights: {bits: 4}}}", ["plugins.qat.weights", "weight"]),
        ("plugins: {qat: {weight: {bits: 99}}}", ["plugins.qat.weight", "99", "32"]),
        ("plugins: {qat: {weight: {bits: many}}}", ["plugins.qat.weight.bits", "many"]),
        ("plugins: {qat: {overrides: [{layer: lin, skip: true}]}}", ["lin", "Valid: 0, 2"]),
        ("plugins: {qat: {overrides: 3}}", ["plugins.qat.overrides", "3"]),
        ("plugins: {}", ["plugins"]),
        ("plugins: {distillation: {}}", ["teacher_model"]),
        ("plugins: {qat: {}, qat: {}}", ["recipe.yaml", "qat"]),
        ("plugins: [", ["recipe.yaml"]),
    ],
)
def test_recipe(model: nn.Module, tmp_path: Path, text: str, expected: list[str]) -> None:
    with pytest.raises(CompressionError) as error:
        prepare_compression(model, _recipe(tmp_path, text))
    for part in expected:
        assert part in str(error.value)


def test_missing_recipe_names_the_file(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        prepare_compression(model, tmp_path / "nowhere.yaml")


def test_override_that_matches_nothing(model: nn.Module, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "plugins: {qat: {}}")
    with pytest.raises(ConfigError, match="wieght"):
        prepare_compression(model, recipe, overrides=["plugins.qat.wieght.bits=4"])
    with pytest.raises(ConfigError, match=r"0.bias|0, 2"):
        prepare_compression(model, [QATConfig(overrides=(LayerRule(layer="1x", skip=True),))])


@pytest.mark.parametrize("configs", [[], [3], "missing.yaml", None, QATConfig()])
def test_configs_of_a_wrong_kind(model: nn.Module, configs: Any) -> None:
    with pytest.raises(ConfigError):
        prepare_compression(model, configs)


@pytest.mark.parametrize("not_a_model", [None, 3, lambda x: x, toys.mlp().state_dict()])
def test_model_that_is_no_module(not_a_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
        prepare_compression(not_a_model, [QATConfig()])


def test_teacher_that_is_the_student(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="teacher is the student"):
        prepare_compression(model, [QATConfig(), DistillationConfig(model)])


def test_mismatched_logits_at_prepare(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="classes"):
        prepare_compression(
            model,
            [QATConfig(), DistillationConfig(toys.mlp(classes=7))],
            example_inputs=torch.randn(2, 6),
        )


def test_mismatched_logits_at_the_first_step(model: nn.Module) -> None:
    manager = prepare_compression(model, [DistillationConfig(toys.mlp(classes=7))])
    manager.on_train_begin()
    manager.on_step_begin(0)
    inputs = torch.randn(2, 6)
    output = model(inputs)
    with pytest.raises(ConfigError, match=r"\(2, 4\).*\(2, 7\)"):
        manager.on_after_compute_loss(inputs, output, output.mean())
    manager.close()


@pytest.mark.parametrize(
    "loss",
    [
        torch.ones(2),
        torch.tensor(3),
        3.0,
        None,
        torch.tensor(float("nan")),
        torch.tensor(float("inf")),
    ],
)
def test_loss_that_is_no_finite_scalar(model: nn.Module, loss: Any) -> None:
    manager = prepare_compression(model, [QATConfig()])
    manager.on_train_begin()
    manager.on_step_begin(0)
    with pytest.raises(LossError):
        manager.on_after_compute_loss(torch.randn(2, 6), torch.randn(2, 4), loss)
    manager.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.on_step_begin(0),
        lambda m: m.on_epoch_begin(0),
        lambda m: m.on_step_end(),
        lambda m: m.on_epoch_end(),
        lambda m: m.on_train_end(),
        lambda m: m.on_after_compute_loss(None, None, torch.ones(())),
        lambda m: m.on_before_optimizer_step(),
        lambda m: m.on_after_optimizer_step(),
        lambda m: m.on_after_eval({}),
    ],
)
def test_hooks_out_of_order(model: nn.Module, call: Callable[[Any], Any]) -> None:
    manager = prepare_compression(model, [QATConfig()])
    with pytest.raises(LifecycleError):
        call(manager)
    manager.close()


def test_empty_loader(model: nn.Module) -> None:
    with prepare_compression(model, [QATConfig()]) as manager:
        manager.on_train_begin()
        manager.on_epoch_begin(0)
        with pytest.raises(CompressionError, match="no batch"):
            list(manager.steps([]))
        with pytest.raises(LifecycleError, match="without a single step"):
            manager.on_epoch_end()


@pytest.mark.parametrize("content", [None, "empty", "foreign", "file", "garbage"])
def test_unreadable_or_foreign_checkpoint(
    model: nn.Module, tmp_path: Path, content: str | None
) -> None:
    directory = tmp_path / "checkpoint"
    if content == "file":
        directory.write_text("x")
    elif content is not None:
        directory.mkdir()
        if content == "foreign":
            (directory / "model.bin").write_bytes(b"x")
        elif content == "garbage":
            (directory / "manifest.json").write_text("{]")
    before = sorted((p, p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*"))
    manager = prepare_compression(model, [QATConfig()])
    with pytest.raises(CheckpointError) as error:
        manager.resume(directory)
    manager.close()
    assert "checkpoint" in str(error.value)
    after = sorted((p, p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*"))
    assert before == after


@pytest.mark.parametrize("value", [None, 3, "", b"folder"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("resume", lambda manager, value: manager.resume(value)),
        ("load_weights", lambda manager, value: manager.load_weights(value)),
        ("save_converted", lambda manager, value: manager.save_converted(value)),
        ("deploy.load", lambda manager, value: deploy.load(value, toys.mlp())),
    ],
)
def test_folder_that_is_no_path(model: nn.Module, name: str, call: Any, value: Any) -> None:
    manager = prepare_compression(model, [QATConfig()])
    with pytest.raises(ConfigError, match=rf"^{name} takes the path of a folder, got"):
        call(manager, value)
    manager.close()


def test_checkpoint_directory_that_is_a_file(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ConfigError, match="taken"):
        prepare_compression(model, [QATConfig(), CheckpointConfig(tmp_path / "taken")])
    assert (tmp_path / "taken").read_text() == "mine"


def _trained(directory: Path, *, epochs: int = 2, **options: Any) -> None:
    model = toys.ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    configs = [QATConfig(**options), CheckpointConfig(directory, keep_last=3)]
    with prepare_compression(model, configs) as manager:
        manager.track(optimizer=optimizer)
        toys.train(manager, toys.loader(toys.images()), optimizer, epochs=epochs)


def _prepared(directory: Path, *, keep_last: int = 3, **options: Any) -> CompressionManager:
    model = toys.ConvNet()
    configs = [QATConfig(**options), CheckpointConfig(directory, keep_last=keep_last)]
    manager = prepare_compression(model, configs)
    manager.track(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    return manager


def test_newest_checkpoint_that_lost_its_manifest_is_not_skipped(tmp_path: Path) -> None:
    _trained(tmp_path)
    (tmp_path / "step-00000008" / "manifest.json").unlink()
    manager = _prepared(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000008.*step-00000004"):
        manager.resume(tmp_path)
    assert manager.resume(tmp_path / "step-00000004").global_step == 4
    manager.close()


def test_other_scheme_than_the_checkpoint_names_the_layer(tmp_path: Path) -> None:
    _trained(tmp_path)
    four_bits = QuantizationScheme(bits=4, granularity="channel")
    manager = _prepared(tmp_path, weight=four_bits)
    before = copy.deepcopy(manager.model.state_dict())
    with pytest.raises(CheckpointError, match=r"'conv1'.*int8.*here.*int4"):
        manager.resume(tmp_path)
    toys.assert_identical(dict(manager.model.state_dict()), dict(before))
    manager.close()


def test_plain_loop_that_starts_over_after_resuming(tmp_path: Path) -> None:
    _trained(tmp_path)
    manager = _prepared(tmp_path)
    manager.resume(tmp_path)
    manager.on_train_begin()
    with pytest.raises(LifecycleError, match="resumed at epoch 2"):
        manager.on_epoch_begin(0)
    manager.on_epoch_begin(2)
    manager.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            "qat: {overrides: [{layer: '0', skip: true}, {layer: '3', skip: true}]}",
            "plugins.qat.overrides[1].layer: LayerRule(layer='3') matches no layer",
        ),
        ("qat: {overrides: [{module_class: Conv}]}", "plugins.qat.overrides[0].module_class: "),
        ("qat: {weight: {axis: 4}}", "plugins.qat.weight.axis: layer '0': axis 4"),
        (
            "qat: {overrides: [{layer: '2', weight: {granularity: channel, axis: 2}}]}",
            "plugins.qat.overrides[0].weight.axis: layer '2': axis 2",
        ),
        (
            "kd: {plugin: distillation, criterion: {loss_types: [CE, KLD]}}",
            "plugins.kd.criterion.loss_types[1]: no plugin offers the distillation loss 'KLD'; "
            "did you mean 'KL'?",
        ),
        (
            "distillation: {criterion: {loss_options: {a: 1}}}",
            "plugins.distillation.criterion: the distillation loss 'CE' has no option 'a'",
        ),
        (
            "a: {plugin: distillation}, b: {plugin: distillation, "
            "criterion: {loss_weights: [1, 1]}}",
            "plugins.b.criterion.loss_weights[0]: plugins disagree",
        ),
        ("distillation: {teacher_output: 3}", "plugins.distillation.teacher_output: the teacher "),
        (
            "qat: {}, checkpoint: {directory: /dev/null/x}",
            "plugins.checkpoint.directory: /dev/null/x cannot be a folder",
        ),
        ("qat: {}, checkpoint: {directory: /proc/x}", "plugins.checkpoint.directory: /proc/x cann"),
        ("qat: {}, tensorboard: {directory: /proc/x}", "plugins.tensorboard.directory: /proc/x "),
    ],
)
def test_errors_after_parsing_name_file_and_key_path(
    model: nn.Module, tmp_path: Path, options: str, expected: str
) -> None:
    path = _recipe(tmp_path, f"plugins: {{{options}}}")
    teacher = {"teacher_model": toys.mlp()} if "distillation" in options else {}
    with pytest.raises(ConfigError) as error:
        prepare_compression(model, path, example_inputs=torch.randn(2, 6), **teacher)
    assert str(error.value).startswith(f"{path}: {expected}")


def test_key_path_of_a_list_of_configs(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"^qat\.overrides\[0\]\.layer: Layer") as error:
        prepare_compression(model, [QATConfig(overrides=(LayerRule(layer="x", skip=True),))])
    assert error.value.key_path == "plugins.qat.overrides[0].layer"


def test_unknown_plugin_names_the_recipe(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml: plugins\.qatt: .*did you mean 'qat'"):
        prepare_compression(model, _recipe(tmp_path, "plugins: {qatt: {}}"))


def test_other_options_than_the_checkpoint_are_told(tmp_path: Path) -> None:
    _trained(tmp_path)
    manager = _prepared(tmp_path, keep_last=2)
    with pytest.warns(UserWarning, match=r"plugins\.checkpoint\.keep_last: 3 in the .*, 2 now"):
        manager.resume(tmp_path)
    manager.close()


@pytest.mark.parametrize("value", ["true", "3", "2.5"])
def test_recipe_takes_only_text_where_text_is_meant(
    model: nn.Module, tmp_path: Path, value: str
) -> None:
    text = f"plugins: {{qat: {{}}, checkpoint: {{directory: d, metric: {value}}}}}"
    with pytest.raises(ConfigError, match=r"recipe\.yaml.*plugins\.checkpoint\.metric"):
        prepare_compression(model, _recipe(tmp_path, text))
