"""The example of a third party's plugin: installed elsewhere, and in every order with ours."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import toys
from compression_manager import StartAt, prepare_compression
from compression_plugins import DistillationConfig, QATConfig
from plugin_environments import Environment, install
from rank_runs import on_ranks
from toy_teachers import criterion

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_plugin"
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")
(RECIPE,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
NAMES = ("pruning", "qat", "distillation")
RAMP = {"sparsity": 0.75, "start": StartAt(step=1), "end": StartAt(step=4)}

# A fresh environment ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install(EXAMPLE, tmp_path_factory.mktemp("environment"))


def test_installed_plugin_is_listed_and_passes_its_own_tests(environment: Environment) -> None:
    output = environment.use("magnitude_pruning", RECIPE)
    assert "magnitude_pruning (compression-magnitude-pruning 0.1.0)\n" in output
    assert "  magnitude_pruning:\n    sparsity: 0.8\n" in output
    assert re.search(r"\d+ passed", output), output


SCRIPT = """
import torch
from compression_manager.testing import loader, train, vectors

def result(manager):
    torch.manual_seed(0)
    manager.model.load_state_dict(initial, strict=False)
    optimizer = torch.optim.SGD(manager.model.parameters(), 0.1, momentum=0.9)
    manager.track(optimizer=optimizer)
    train(manager, loader(vectors()), optimizer, 6)
    return manager.convert()

initial = {name: value.clone() for name, value in model.named_parameters()}
first = result(manager)
manager.close()
second = result(prepare_compression(model, "recipe.yaml"))
for layer in (first[0], first[2]):
    assert int((layer.weight == 0).sum()) >= round(0.8 * layer.weight.numel())
tensors = second.state_dict()
assert all(torch.equal(value, tensors[name]) for name, value in first.state_dict().items())
assert type(first[0]).__name__ == "ConvertedLinear"
"""


def test_python_and_recipe_of_its_readme_give_the_same_model(environment: Environment) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (environment.folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (environment.folder / "script.py").write_text(code + SCRIPT, encoding="utf-8")
    environment.run("script.py")


COMPATIBLE = """
import torch
from compression_manager.testing import tiny_classifier, vectors
from compression_plugins.compat.neural_compressor import WeightPruningConfig, prepare_compression

config = WeightPruningConfig(
    target_sparsity=0.75,
    pruning_type="magnitude",
    pattern="1x1",
    sparsity_decay_type="cube",
    start_step=1,
    end_step=3,
)
manager = prepare_compression(tiny_classifier(), config)
optimizer = torch.optim.SGD(manager.model.parameters(), 0.1, momentum=0.9)
inputs, targets = vectors(8).tensors
manager.on_train_begin()
for step in range(4):
    manager.on_step_begin(step)
    output = manager.model(inputs)
    loss = torch.nn.functional.cross_entropy(output, targets)
    manager.on_after_compute_loss(inputs, output, loss).backward()
    manager.on_before_optimizer_step()
    optimizer.step()
    optimizer.zero_grad()
    manager.on_step_end()
weights = [value for value in manager.model.parameters() if value.dim() == 2]
assert len(weights) > 1
zeros = [int((value == 0).sum()) for value in weights[:-1]]
assert zeros == [round(0.75 * value.numel()) for value in weights[:-1]], zeros
assert weights[-1].all()  # the last layer, as in 2.6
"""


def test_it_serves_the_pruning_config_of_neural_compressor(environment: Environment) -> None:
    environment.run("-W", "error::UserWarning", "-c", COMPATIBLE)


def test_it_imports_public_modules_only() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in EXAMPLE.rglob("*.py"))
    used = set(re.findall(r"^(?:from|import) (compression_(?:manager|plugins)[\w.]*)", text, re.M))
    public = ("deploy", "quantization", "testing")
    assert used <= {
        "compression_manager",
        "compression_plugins",
        *(f"compression_manager.{name}" for name in public),
    }
    assert "compression_manager" in used


# Beside our plugins -------------------------------------------------------------------------------


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(EXAMPLE / "src")
    yield
    for name in [name for name in sys.modules if name.startswith("compression_magnitude_pruning")]:
        del sys.modules[name]


def pruning() -> Any:
    """Return a plugin, as an instance: it is not installed here."""
    from compression_magnitude_pruning import MagnitudePruningConfig, MagnitudePruningPlugin

    return MagnitudePruningPlugin(MagnitudePruningConfig(**RAMP))


class Result(NamedTuple):
    losses: list[float]
    state: dict[str, Any]
    converted: dict[str, Tensor]


def result(order: tuple[str, ...]) -> Result:
    torch.manual_seed(0)
    model = toys.ConvNet(dropout=0.3)
    configs = {
        "pruning": pruning(),
        "qat": QATConfig(),
        # Its teacher is an average of the student's weights, which it must see as pruned.
        "distillation": DistillationConfig(
            teacher_outputs="ema", ema_decay=0.5, criterion=criterion("KL", 4.0)
        ),
    }
    manager = prepare_compression(model, [configs[name] for name in order])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    manager.track(optimizer=optimizer)
    losses = toys.train(manager, toys.loader(toys.images(24)), optimizer, 2)
    state = manager.state_dict()
    return Result(
        losses,
        {**state["model"], "plugins": dict(sorted(state["plugins"].items()))},
        dict(manager.convert().state_dict()),
    )


@pytest.mark.usefixtures("_importable")
def test_every_order_with_distillation_and_qat_gives_the_same_result() -> None:
    expected = result(NAMES)
    assert len(set(expected.losses)) == 6
    masks = expected.state["plugins"]["magnitude_pruning"]["masks"]
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert zeros == {"conv1.weight": 27, "conv2.weight": 108, "fc.weight": 192}
    for name, mask in masks.items():
        assert not expected.converted[name][~mask].any()
    for order in itertools.permutations(NAMES):
        toys.assert_identical(result(order), expected)


def masks_of_a_rank(rank: int) -> dict[str, Tensor]:
    """Train on a rank's half of each batch; its first weights are others than on rank 0."""
    sys.path.insert(0, str(EXAMPLE / "src"))
    torch.manual_seed(rank)
    model = toys.mlp()
    manager = prepare_compression(model, [pruning()])
    called = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    manager.track(optimizer=optimizer)
    inputs, targets = toys.vectors(16).tensors
    half = slice(8 * rank, 8 * rank + 8)
    for _ in manager.epochs(1):
        for _ in manager.steps(range(5)):
            output = called(inputs[half])
            loss = F.cross_entropy(output, targets[half])
            manager.on_after_compute_loss(inputs[half], output, loss).backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
    return {
        **manager.state_dict()["plugins"]["magnitude_pruning"]["masks"],
        **{f"{name} of the model": value for name, value in model.state_dict().items()},
    }


def test_ranks_have_the_same_masks(tmp_path: Path) -> None:
    first, second = on_ranks(masks_of_a_rank, tmp_path)
    toys.assert_identical(first, second)
    assert int((~first["0.weight"]).sum()) == 36
