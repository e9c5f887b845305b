"""What a new user tries first, as the documentation tells it: loop, recipe, plugin, migration."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compression_manager import deploy, prepare_compression
from compression_manager.cli import main
from compression_manager.testing import tokens
from compression_plugins import (
    CheckpointConfig,
    DistillationConfig,
    KnowledgeDistillationLossConfig,
    QATConfig,
    TensorBoardConfig,
)
from plugin_environments import install

TOKENS, LABELS = tokens(24).tensors
LABELS = LABELS[:, 0]


class Encoder(nn.Module):
    """A classifier of token sequences around `nn.TransformerEncoder`."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))  # type: ignore[no-any-return]


def bert(width: int, layers: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(  # type: ignore[no-any-return]
        transformers.BertConfig(
            vocab_size=16,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * width,
            max_position_embeddings=8,
            num_labels=4,
        )
    )


# Hooks in a loop of one's own ------------------------------------------------------------------


def _train(make: Any, run: Path, stop_after: int | None = None) -> tuple[nn.Module, Tensor]:
    """Write the loop of the README by hand, and return the int8 model and its logits."""
    torch.manual_seed(0)
    teacher, model = make(16, 2), make(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    loader = DataLoader(TensorDataset(TOKENS, LABELS), batch_size=8, shuffle=True)
    criterion = KnowledgeDistillationLossConfig(temperature=2, loss_types=["CE", "KL"])
    manager = prepare_compression(
        model,
        [
            DistillationConfig(teacher, criterion=criterion),
            QATConfig(),
            CheckpointConfig(run / "checkpoints", metric="accuracy"),
            TensorBoardConfig(run / "tensorboard"),
        ],
    )
    with manager:
        manager.track(optimizer=optimizer, scheduler=scheduler, dataloader=loader)
        start = manager.resume(run / "checkpoints", missing_ok=True)
        manager.on_train_begin()
        for epoch in range(start.epoch, 3):
            manager.on_epoch_begin(epoch)
            for step, (inputs, labels) in enumerate(loader):
                manager.on_step_begin(step)
                output = model(inputs)
                logits = output if isinstance(output, Tensor) else output.logits
                loss = nn.functional.cross_entropy(logits, labels)
                loss = manager.on_after_compute_loss(inputs, output, loss)
                loss.backward()
                manager.on_before_optimizer_step()
                optimizer.step()
                manager.on_after_optimizer_step()
                optimizer.zero_grad()
                manager.on_step_end()
                if manager.position.global_step == stop_after:
                    raise KeyboardInterrupt
            scheduler.step()
            manager.on_before_eval()
            manager.on_after_eval({"accuracy": epoch / 4})
            manager.on_epoch_end()
        manager.on_train_end()
        int8 = manager.convert(TOKENS)
        manager.save_converted(run / "int8")
        return int8, _logits(int8)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model.eval()(TOKENS)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("make", [Encoder, bert])
def test_hooks_in_a_hand_written_loop_around_a_transformer(
    make: Any, tmp_path: Path, capsys: Any
) -> None:
    _, expected = _train(make, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(make, tmp_path / "stopped", stop_after=5)
    int8, resumed = _train(make, tmp_path / "stopped")
    assert torch.equal(resumed, expected)
    assert any(isinstance(module, deploy.ConvertedLinear) for module in int8.modules())
    served = deploy.load(tmp_path / "stopped" / "int8", make(8, 1))
    assert torch.equal(_logits(served), expected)
    assert main(["report", str(tmp_path / "stopped")]) == 0
    page = (tmp_path / "stopped" / "report.html").read_text(encoding="utf-8")
    for shown in ("distillation/KL", "accuracy", "weight SQNR"):
        assert shown in page
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "whole"), str(tmp_path / "stopped"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


# A recipe with two distillers ------------------------------------------------------------------

RECIPE = """
seed: 0
plugins:
  logits:
    plugin: distillation
    criterion: {type: knowledge_distillation, temperature: 3, loss_types: [CE, KL]}
  layers:
    plugin: distillation
    criterion:
      type: intermediate_layers
      layer_mappings: [[encoder.layers.0, encoder.layers.1]]
  qat: {}
  tensorboard: {directory: elsewhere}
"""


def test_a_recipe_with_two_distillers(tmp_path: Path, capsys: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    overrides = [
        f"plugins.tensorboard.directory={tmp_path / 'run' / 'tensorboard'}",
        "plugins.layers.criterion.loss_weights=2",
    ]
    assert main(["check", str(recipe), *overrides]) == 0
    assert "# plugins.layers.teacher_model: to be passed" in capsys.readouterr().out
    assert main(["check", str(recipe), "plugins.layer.criterion.loss_weights=2"]) == 1
    assert "did you mean 'layers'" in capsys.readouterr().err

    torch.manual_seed(0)
    teacher, model = Encoder(16, 2), Encoder(8, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with prepare_compression(model, recipe, overrides=overrides, teacher_model=teacher) as manager:
        manager.track(optimizer=optimizer)
        for _ in manager.epochs(2):
            for _, (inputs, labels) in manager.steps([(TOKENS, LABELS)]):
                output = model(inputs)
                loss = nn.functional.cross_entropy(output, labels)
                manager.on_after_compute_loss(inputs, output, loss).backward()
                manager.on_before_optimizer_step()
                optimizer.step()
                manager.on_after_optimizer_step()
                optimizer.zero_grad()
        int8 = manager.convert()
    assert not any("rojection" in type(module).__name__ for module in int8.modules())
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "logits/KL" in page
    assert "layers/MSE/encoder.layers.0" in page


# An observer plugin from `new-plugin` ----------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-plugin.md"
OBSERVER_TESTS = """
from __future__ import annotations

import torch
from compression_manager import PluginConfig, prepare_compression
from compression_manager.testing import PluginContract
from compression_plugins import QATConfig
from torch import nn

from compression_quantile import QuantileConfig, QuantileObserver


class TestContract(PluginContract):
    def make_config(self) -> PluginConfig:
        return QuantileConfig()

    def make_companions(self) -> list[PluginConfig]:
        return [QATConfig()]


def test_a_recipe_decides_who_watches() -> None:
    model = nn.Linear(4, 2)
    with prepare_compression(model, "recipe.yaml") as manager:
        (observer,) = [m for m in model.modules() if isinstance(m, QuantileObserver)]
        manager.on_train_begin()
        manager.on_step_begin(0)
        inputs = torch.arange(101.0)[:, None].expand(101, 4)
        model(inputs)
        assert [end.item() for end in observer.observed_range()] == [10.0, 90.0]
"""


@pytest.mark.slow
def test_an_observer_plugin_from_the_page(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = tmp_path / "project"
    assert main(["new-plugin", "quantile", "--directory", str(project)]) == 0
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (classes,) = [block for block in blocks if "class QuantileObserver" in block]
    imports = blocks[0][: blocks[0].index("@dataclass")]
    source = project / "src" / "compression_quantile"
    (source / "config.py").unlink()
    (source / "plugin.py").write_text(imports + classes[: classes.index("class TestQuantile")])
    names = "QuantileConfig, QuantileObserver, QuantilePlugin"
    (source / "__init__.py").write_text(f"from compression_quantile.plugin import {names}\n")
    (project / "tests" / "test_quantile.py").write_text(OBSERVER_TESTS)
    environment = install(project, tmp_path_factory.mktemp("environment"))
    output = environment.use("quantile", "plugins:\n  quantile: {percentile: 90}\n  qat: {}\n")
    assert "quantile (compression-quantile 0.1.0)\n" in output
    assert re.search(r"\d+ passed", output), output


# A script for Neural Compressor 2.6 ------------------------------------------------------------

SCRIPT = """
import copy
import torch
from torch import nn
from neural_compressor.config import DistillationConfig, KnowledgeDistillationLossConfig
from neural_compressor.config import QuantizationAwareTrainingConfig
from neural_compressor.training import prepare_compression
from neural_compressor.utils.pytorch import load


def evaluate(model):
    model.eval()
    with torch.no_grad():
        return model(images)


def train_func(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    compression_manager.callbacks.on_train_begin()
    for epoch in range(2):
        model.train()
        compression_manager.callbacks.on_epoch_begin(epoch)
        for step in range(3):
            compression_manager.callbacks.on_step_begin(step)
            output = model(images)
            loss = nn.CrossEntropyLoss()(output, target)
            loss = compression_manager.callbacks.on_after_compute_loss(images, output, loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            compression_manager.callbacks.on_step_end()
        scheduler.step()
        compression_manager.callbacks.on_epoch_end()
        evaluate(model)
    compression_manager.callbacks.on_train_end()
    return model


def network(width):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5),
    )


torch.manual_seed(0)
images, target = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
model, fresh, teacher = network(4), network(4), network(8)
criterion = KnowledgeDistillationLossConfig(
    temperature=2.0, loss_types=["CE", "KL"], loss_weights=[0.5, 0.5]
)
d_conf = DistillationConfig(teacher_model=teacher, criterion=criterion)
q_conf = QuantizationAwareTrainingConfig()
compression_manager = prepare_compression(model, [d_conf, q_conf])
model = train_func(compression_manager.model)
compression_manager.save("saved")
trained, loaded = evaluate(model), evaluate(load("saved", fresh))
"""


def test_a_script_of_neural_compressor_2_6_with_its_imports_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = "from compression_plugins.compat.neural_compressor"
    Path("script.py").write_text(SCRIPT.replace("from neural_compressor", ours))
    ended = runpy.run_path("script.py")
    assert torch.equal(ended["trained"], ended["loaded"])
    assert any(isinstance(m, deploy.ConvertedLinear) for m in ended["model"].modules())
