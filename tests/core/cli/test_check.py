"""`compression-manager check`: what it prints and refuses, for our plugins and anybody's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from torch import nn

import toys
from compression_manager import (
    ConfigError,
    MissingObjectError,
    Plugin,
    PluginConfig,
    option,
    prepare_compression,
)
from compression_manager.cli import main

EXAMPLE = Path(__file__).parents[3] / "examples" / "recipes" / "distill_and_quantize.yaml"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write_recipe(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_recipe


def test_every_option_is_printed_with_overrides_and_default_providers(
    write: Any, capsys: Any
) -> None:
    path = write("seed: 3\nplugins:\n  qat: {weight: {bits: 4}}\n  progress: {enabled: false}\n")
    assert main(["check", path, "seed=5", "plugins.qat.activation.bits=6"]) == 0
    printed = capsys.readouterr()
    resolved = yaml.safe_load(printed.out)
    assert resolved["seed"] == 5
    assert list(resolved["plugins"]) == ["qat", "calibration"]
    assert resolved["plugins"]["qat"]["weight"]["bits"] == 4
    assert resolved["plugins"]["qat"]["activation"]["bits"] == 6
    assert resolved["plugins"]["qat"]["activation"]["signed"] is False
    assert printed.err == ""


def test_output_is_what_prepare_compression_makes_of_the_recipe(
    write: Any, capsys: Any, tmp_path: Path
) -> None:
    path = write(f"plugins: {{qat: {{}}, checkpoint: {{directory: {tmp_path}/run}}}}")
    assert main(["check", path]) == 0
    manager = prepare_compression(toys.mlp(), path)
    assert yaml.safe_load(capsys.readouterr().out) == manager.state_dict()["recipe"]
    manager.close()


@pytest.mark.parametrize(
    "plugins",
    [
        "{distillation: {criterion: {type: intermediate_layers, layer_mappings: [[a, b]]}}}",
        "{first: {plugin: distillation, criterion: {temperature: 2}}, distillation: {}, qat: {}}",
        "{ptq: {}}",
        "{ptq: {mode: dynamic}}",
        "{ptq: {mode: weight_only, weight: {bits: 4, granularity: group, group_size: 32}}}",
        "{qat: {overrides: [{layer: '*fc', weight: {bits: 4}}]}, learned_scale: {},"
        " batch_norm_reestimation: {batches: 7}}",
        "{qat: {}, calibration: {observer: {type: histogram}}, tensorboard: {directory: runs}}",
        "{early_stopping: {metric: loss}, progress: {}, checkpoint: {directory: runs}}",
    ],
)
def test_output_is_a_recipe_that_gives_itself(write: Any, capsys: Any, plugins: str) -> None:
    assert main(["check", write(f"plugins: {plugins}")]) == 0
    first = capsys.readouterr().out
    assert main(["check", write(first)]) == 0
    assert capsys.readouterr().out == first


def test_example_recipe_notes_the_teacher(capsys: Any) -> None:
    assert main(["check", str(EXAMPLE)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "# plugins.distillation.teacher_model: to be passed to "
        "prepare_compression(..., teacher_model=...)",
        "seed: 0",
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("plugins: {qatt: {}}", [], ["plugins.qatt", "did you mean 'qat'"]),
        (
            "plugins: {logits: {temperature: 4}}",
            [],
            ["plugins.logits", "Below a key of your own, write 'plugin: NAME'."],
        ),
        ("plugins: {qat: {wieght: {}}}", [], ["plugins.qat.wieght", "did you mean 'weight'"]),
        (
            "plugins: {distillation: {criterion: {type: knowledge_distilation}}}",
            [],
            ["plugins.distillation.criterion.type", "did you mean 'knowledge_distillation'"],
        ),
        (
            "plugins: {distillation: {criterion: {temperature: 0}}}",
            [],
            ["plugins.distillation.criterion", "temperature must be"],
        ),
        (
            "plugins: {distillation: {ema_decay: 7}}",
            [],
            ["plugins.distillation", "ema_decay must be"],
        ),
        ("plugins: {qat: {}}", ["plugins.qta.weight.bits=4"], ["did you mean 'qat'"]),
        ("plugins: {qat: {weight: {bits: four}}}", [], ["plugins.qat.weight.bits", "int"]),
        ("plugins: {ptq: {calibration_batches: 0}}", [], ["plugins.ptq", "calibration_batches"]),
        ("plugins: {ptq: {}, qat: {}}", [], ["both own the role 'fake_quant'"]),
        ("plugins: {qat: {enabled: false}}", [], ["no plugin is enabled"]),
        ("plugins: {distillation: {teacher_model: x}}", [], ["teacher_model is a live object"]),
        ("plugins: [", [], ["line 2, column 1"]),
    ],
)
def test_mistakes_exit_with_1_and_say_where(
    write: Any, capsys: Any, text: str, overrides: list[str], parts: list[str]
) -> None:
    path = write(text)
    assert main(["check", path, *overrides]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in [path, *parts]:
        assert part in printed.err


def test_missing_file_is_no_traceback(tmp_path: Path, capsys: Any) -> None:
    assert main(["check", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml does not exist" in capsys.readouterr().err


# A third party's plugins -------------------------------------------------------------------------


@dataclass(frozen=True)
class NeedyConfig(PluginConfig):
    plugin: ClassVar[str] = "needy"
    model: nn.Module | None = field(default=None, metadata=option("A model.", runtime=True))
    size: int = field(default=1, metadata=option("A size."))

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError("NeedyConfig.size must be at least 1.")
        if self.model is None:
            raise MissingObjectError("NeedyConfig.model is missing.", option="model")


class NeedyPlugin(Plugin[NeedyConfig]):
    config_class = NeedyConfig
    roles = frozenset({"fake_quant"})


class ImpatientPlugin(Plugin[NeedyConfig]):
    """Its constructor cannot do without the model."""

    config_class = NeedyConfig

    def __init__(self, config: NeedyConfig) -> None:
        super().__init__(config)
        self.weight = config.model.weight


@dataclass(frozen=True)
class StrictConfig(PluginConfig):
    plugin: ClassVar[str] = "strict"
    model: nn.Module = field(metadata=option("A model.", runtime=True))
    size: int = field(default=1, metadata=option("A size."))
    more: list[int] = field(default_factory=lambda: [3], metadata=option("More sizes."))

    def __post_init__(self) -> None:
        self.model.train()


class StrictPlugin(Plugin[StrictConfig]):
    config_class = StrictConfig


def test_anybodys_missing_object_is_a_note(
    install: Any, module: Any, write: Any, capsys: Any
) -> None:
    module.Plugin = NeedyPlugin
    install(("needy", "third_party_module:Plugin", "dist-needy"))
    path = write("plugins: {mine: {plugin: needy, size: 2}}")
    assert main(["check", path]) == 0
    output = capsys.readouterr().out
    assert "# plugins.mine.model: to be passed to prepare_compression(..., model=...)" in output
    assert yaml.safe_load(output)["plugins"] == {"mine": {"plugin": "needy", "size": 2}}
    with pytest.raises(MissingObjectError, match=r"recipe\.yaml: plugins\.mine: .*is missing"):
        prepare_compression(toys.mlp(), path)


def test_other_checks_of_such_a_plugin_still_refuse(
    install: Any, module: Any, write: Any, capsys: Any
) -> None:
    module.Plugin = NeedyPlugin
    install(("needy", "third_party_module:Plugin", "dist-needy"))
    assert main(["check", write("plugins: {needy: {size: 0}}")]) == 1
    assert "plugins.needy: NeedyConfig.size must be at least 1" in capsys.readouterr().err
    roles = "plugins: {needy: {}, other: {plugin: needy}}"
    assert main(["check", write(roles)]) == 1
    assert "both own the role" in capsys.readouterr().err


def test_constructor_that_needs_the_object_is_noted(
    install: Any, module: Any, write: Any, capsys: Any
) -> None:
    module.Plugin = ImpatientPlugin
    install(("needy", "third_party_module:Plugin", "dist-needy"))
    assert main(["check", write("plugins: {needy: {size: 2}}")]) == 0
    output = capsys.readouterr().out
    assert "# plugins.needy: not checked together with the other plugins" in output
    assert yaml.safe_load(output)["plugins"] == {"needy": {"size": 2}}


def test_required_object_leaves_types_to_be_checked(
    install: Any, module: Any, write: Any, capsys: Any
) -> None:
    module.Plugin = StrictPlugin
    install(("strict", "third_party_module:Plugin", "dist-strict"))
    assert main(["check", write("plugins: {strict: {size: 2}}")]) == 0
    output = capsys.readouterr().out
    assert "plugins.strict.model: to be passed" in output
    assert "only the types of the options in plugins.strict can be checked" in output
    assert yaml.safe_load(output)["plugins"] == {"strict": {"size": 2, "more": [3]}}
    assert main(["check", write("plugins: {strict: {size: two}}")]) == 1
    assert "plugins.strict.size" in capsys.readouterr().err


def test_broken_plugin_is_named_with_its_distribution(
    install: Any, write: Any, capsys: Any
) -> None:
    install(("broken", "no_such_module_at_all:Plugin", "dist-broken"))
    assert main(["check", write("plugins: {broken: {}}")]) == 1
    assert "dist-broken" in capsys.readouterr().err


def test_plugin_that_requires_no_hook_of_ours_is_refused(
    install: Any, module: Any, write: Any, capsys: Any
) -> None:
    @dataclass(frozen=True)
    class DemandingConfig(PluginConfig):
        plugin: ClassVar[str] = "demanding"

    module.Plugin = type(
        "DemandingPlugin",
        (Plugin,),
        {"config_class": DemandingConfig, "required_hooks": lambda self: {"on_epoch_begn"}},
    )
    install(("demanding", "third_party_module:Plugin", "dist-demanding"))
    path = write("plugins: {demanding: {}}")
    assert main(["check", path]) == 1
    error = capsys.readouterr().err
    assert path in error
    assert "did you mean 'on_epoch_begin'" in error


@pytest.mark.parametrize(
    "text",
    [
        'plugins: {checkpoint: {directory: "5e3"}}',
        'seed: 7\nplugins: {progress: {description: "\\\\${seed} of ${seed}"}}',
        'plugins: {"1e3": {plugin: progress}}',
        'plugins: {qat: {overrides: [{layer: "1e3", skip: true}, {layer: "0x1f", skip: true}]}}',
    ],
)
def test_the_output_is_a_recipe_that_means_the_same(text: str, write: Any, capsys: Any) -> None:
    assert main(["check", write(text)]) == 0
    first = capsys.readouterr().out
    assert main(["check", write(first)]) == 0
    assert capsys.readouterr().out == first
