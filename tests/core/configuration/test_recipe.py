import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import Container

from compression_manager.configuration.recipe import Recipe, load_recipe
from compression_manager.errors import ConfigError

GOOD = """
seed: 7
plugins:
  distillation:
    criterion: {type: knowledge_distillation, temperature: 2.0}
  qat: {bits: 8, skip: [head, stem]}
  progress:
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_recipe(text: str | bytes, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_recipe


def refused(path: object, *overrides: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)  # type: ignore[arg-type]
    return str(caught.value)


def assert_plain(value: object) -> None:
    assert not isinstance(value, Container)
    if isinstance(value, dict):
        for item in value.values():
            assert_plain(item)
    if isinstance(value, list):
        for item in value:
            assert_plain(item)


def test_a_recipe_becomes_plain_values_in_order(write) -> None:
    path = write(GOOD)
    recipe = load_recipe(path)
    assert recipe == Recipe(
        seed=7,
        plugins={
            "distillation": {"criterion": {"type": "knowledge_distillation", "temperature": 2.0}},
            "qat": {"bits": 8, "skip": ["head", "stem"]},
            "progress": {},
        },
        source=str(path),
    )
    assert list(recipe.plugins) == ["distillation", "qat", "progress"]
    assert_plain(recipe.plugins)


def test_seed_is_optional(write) -> None:
    assert load_recipe(write("plugins: {qat: {}}")).seed is None


def test_overrides_come_last_and_in_order(write) -> None:
    recipe = load_recipe(
        write(GOOD),
        [
            "plugins.distillation.criterion.temperature=4",
            "plugins.distillation.criterion.temperature=8",
            "plugins.qat.skip[1]=body",
            "plugins.qat.lr = 1e-3",
            "plugins.early_stopping={patience: 3}",
            "plugins.early_stopping.metric=accuracy",
            "plugins.progress.description='a=b'",
            "seed=null",
        ],
    )
    assert recipe.seed is None
    assert recipe.plugins["distillation"]["criterion"] == {
        "type": "knowledge_distillation",
        "temperature": 8,
    }
    assert recipe.plugins["qat"] == {"bits": 8, "skip": ["head", "body"], "lr": 1e-3}
    assert recipe.plugins["early_stopping"] == {"patience": 3, "metric": "accuracy"}
    assert recipe.plugins["progress"] == {"description": "a=b"}
    assert list(recipe.plugins)[-1] == "early_stopping"


def test_the_source_tells_of_overrides(write) -> None:
    path = write(GOOD)
    assert load_recipe(path, ["seed=1"]).source == f"{path} (with overrides seed=1)"


def test_interpolations_see_overrides(write) -> None:
    path = write("seed: 1\nplugins: {a: {x: '${seed}', y: '${.x}${plugins.b.z}'}, b: {z: 3}}")
    assert load_recipe(path, ["seed=5"]).plugins["a"] == {"x": 5, "y": "53"}


def test_no_resolver_is_registered(write) -> None:
    """omegaconf's registry is global: what we added would act on the user's own configurations."""
    script = """
import sys
from omegaconf.basecontainer import BaseContainer
before = dict(BaseContainer._resolvers)
from compression_manager.configuration.recipe import load_recipe
load_recipe(sys.argv[1], ["seed=2"])
assert BaseContainer._resolvers == before
"""
    command = [sys.executable, "-c", script, str(write(GOOD))]
    subprocess.run(command, check=True, timeout=120)


def test_a_missing_file_names_its_neighbours(write) -> None:
    path = write(GOOD, "distil.yaml")
    message = refused(path.with_name("distill.yaml"))
    assert "distill.yaml does not exist" in message
    assert "did you mean 'distil.yaml'" in message
    assert "folder" in refused(path.parent / "nowhere" / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["plugins must be a mapping"]),
        ("- a", ["a recipe is a mapping with the keys plugins and seed"]),
        ("5", ["recipe.yaml"]),
        ("hello", ["recipe.yaml"]),
        ("plugins: {a: {}}\nplugins: {b: {}}", ["line 2, column 1", "duplicate key plugins"]),
        ("plugins: {a: {x: 1, x: 2}}", ["duplicate key x"]),
        ("plugins: [", ["line ", "did not find"]),
        ("plugins:\n\t- a", ["line 2"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
        ("plugins: {a: \0}", ["recipe.yaml"]),
        ("plugins: {a: {x: '${nope}'}}", ["plugins.a.x", "nope"]),
        ("plugins: {a: {x: '${.y}', y: '${.x}'}}", ["plugins.a.", "ecursive"]),
        ("plugins: {a: {x: '${'}}", ["plugins.a.x"]),
        ("plugins:\n  a:\n    x: ???", ["plugins.a.x", "Missing mandatory value"]),
        ("plugins: ${nope}", ["plugins", "nope"]),
        ("plugins: {a: !!python/object/apply:os.system ['x']}", ["python/object", "line 1"]),
        ("plugins: {a: !!set {b, c}}", ["plugins.a"]),
        ("plugins: {a: {}}\nplugin: {}", ["unknown key 'plugin'", "did you mean 'plugins'"]),
        ("plugins: {a: {}}\n1: 2", ["unknown key '1'"]),
        ("qat: {}", ["unknown key 'qat'", "Plugins are listed below 'plugins'."]),
        ("null: 1", ["recipe.yaml"]),
        ("seed: 1", ["plugins must be a mapping of at least one plugin"]),
        ("plugins: {}", ["plugins must be a mapping of at least one plugin"]),
        ("plugins: [qat]", ["plugins must be a mapping", "['qat']"]),
        ("plugins: qat", ["plugins must be a mapping", "'qat'"]),
        ("plugins: {qat: 8}", ["plugins.qat: expected a mapping of options, got 8"]),
        ("plugins: {qat: [8]}", ["plugins.qat: expected a mapping of options, got [8]"]),
        ("plugins: {1: {}}", ["name of a plugin", "got 1"]),
        ("plugins: {a: {plugin: [x]}}", ["plugins.a.plugin", "['x']"]),
        ("plugins: {a: {}}\nseed: -1", ["seed: expected an integer from 0", "got -1"]),
        ("plugins: {a: {}}\nseed: true", ["seed", "got True"]),
        ("plugins: {a: {}}\nseed: 4294967296", ["seed"]),
        ("plugins: {a: {}}\nseed: abc", ["seed", "'abc'"]),
        ("&a [*a]", ["recipe.yaml"]),
        ("plugins: " + "[" * 200_000, ["nest"]),  # PyYAML 6.0.4 refuses it itself
        ("plugins: " + "[" * 900, ["nested deeper than 50 levels"]),
        ("plugins: " + "{a: " * 1000 + "}" * 1000, ["nested deeper than 50 levels"]),
        ("plugins:\n" + "".join(" " * n + "a:\n" for n in range(1, 500)), ["nested deeper"]),
        ("plugins: {a: {x: '" + "${" * 5000 + "'}}", ["recipe.yaml"]),
    ],
)
def test_a_bad_recipe_is_refused_with_file_and_key_path(write, text, parts) -> None:
    path = write(text)
    message = refused(path)
    assert message.startswith((f"{path}: ", f"recipe file {path} "))
    for part in parts:
        assert part in message


def test_aliases_are_expanded_but_not_into_gigabytes(write) -> None:
    shared = load_recipe(write("plugins: {a: {x: &s {u: 1}, y: *s}}"))
    assert shared.plugins["a"] == {"x": {"u": 1}, "y": {"u": 1}}
    lines = ["plugins:", "  a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 9):
        items = ", ".join([f"*a{n - 1}"] * 9)
        lines.append(f"  a{n}: &a{n} [{items}]")
    assert "more than 100000 entries" in refused(write("\n".join(lines)))


def test_a_folder_is_no_recipe(tmp_path) -> None:
    assert f"recipe file {tmp_path} cannot be read" in refused(tmp_path)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("plugins.qat.bits", ["write key.path=value"]),
        ("", ["write key.path=value"]),
        (5, ["write key.path=value"]),
        ("=3", ["no key path"]),
        ("plugins..qat=3", ["no key path"]),
        (".plugins=3", ["no key path"]),
        ("plugins.qat.skip[=3", ["no key path"]),
        ("plugin.qat.bits=4", ["unknown key 'plugin'", "did you mean 'plugins'"]),
        ("plugins.distilation.alpha=4", ["'distilation'", "did you mean 'distillation'"]),
        ("plugins.tensorboard.a=4", ["lists no plugin 'tensorboard'", "added by plugins.NAME={}"]),
        ("plugins.qat=null", ["plugins.qat.enabled=false turns it off"]),
        ("plugins.qat=NULL", ["plugins.qat.enabled=false turns it off"]),
        ("plugins.qat=~", ["plugins.qat.enabled=false turns it off"]),
        ("plugins.tensorboard=", ["write plugins.tensorboard={}"]),
        ("plugins.qat.skip[7]=a", ["does not fit", "range"]),
        ("plugins.qat.skip.first=a", ["does not fit"]),
        ("plugins.qat.bits=[", ["does not fit", "line "]),
        ("plugins.qat.bits=" + "[" * 200_000, ["nest"]),
        ("plugins.qat.bits=!!python/name:os.system ''", ["does not fit"]),
    ],
)
def test_a_bad_override_is_named(write, override, parts) -> None:
    message = refused(write(GOOD), override)
    assert message.startswith(f"override {override!r} cannot be applied: ")
    for part in parts:
        assert part in message


def test_an_override_may_be_what_breaks_the_recipe(write) -> None:
    path = write(GOOD)
    assert refused(path, "plugins=3").startswith(f"{path} (with overrides plugins=3): plugins")
    assert "seed: expected an integer" in refused(path, "seed.x=3")
    assert "plugins.qat.bits: Interpolation key 'x'" in refused(path, "plugins.qat.bits=${x}")


def test_one_text_is_no_list_of_overrides(write) -> None:
    with pytest.raises(ConfigError, match=r"write \['seed=1'\]"):
        load_recipe(write(GOOD), "seed=1")


@pytest.mark.parametrize("overrides", [None, 3, {"seed": 1}])
def test_overrides_are_a_list(write, overrides) -> None:
    with pytest.raises(ConfigError, match="overrides must be a list of texts, got"):
        load_recipe(write(GOOD), overrides)
