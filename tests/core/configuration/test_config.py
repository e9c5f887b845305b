from __future__ import annotations

import enum
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compression_manager.configuration.checks import require_positive
from compression_manager.configuration.config import build_config
from compression_manager.configuration.description import describe_config
from compression_manager.errors import ConfigError, PluginError, QuantizationError
from compression_manager.plugin import PluginConfig, option
from compression_manager.training.schedule import StartAt


class Mode(enum.Enum):
    FAST = "fast"
    EXACT = "exact"


@dataclass(frozen=True)
class Scheme:
    bits: int = field(default=8, metadata=option("Bits."))
    granularity: Literal["tensor", "channel"] = field(default="tensor", metadata=option("Scales."))

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise QuantizationError(f"bits must be from 2 to 8, got {self.bits}.")


@dataclass(frozen=True)
class Soft:
    temperature: float = field(default=1.0, metadata=option("T."))
    weights: tuple[float, ...] = field(default=(0.5, 0.5), metadata=option("Weights."))

    def __post_init__(self) -> None:
        require_positive(self, "temperature", self.temperature)


@dataclass(frozen=True)
class Hint:
    layer: str = field(metadata=option("Which layer to match."))


LOSSES = {"soft": Soft, "hint": Hint}


def registered(help: str) -> dict[str, Any]:
    return {**option(help), "registry": LOSSES}


@dataclass(frozen=True)
class ExampleConfig(PluginConfig):
    plugin: ClassVar[str] = "example"

    count: int = field(default=1, metadata=option("A count."))
    rate: float = field(default=0.1, metadata=option("A rate."))
    limit: float | None = field(default=None, metadata=option("A limit."))
    flag: bool = field(default=False, metadata=option("A flag."))
    text: str = field(default="a", metadata=option("A text."))
    place: str | Path = field(default="runs", metadata=option("A folder."))
    folder: Path = field(default=Path("runs"), metadata=option("A folder."))
    kind: Literal["CE", "KL", "MSE"] = field(default="CE", metadata=option("A kind."))
    when: int | Literal["never"] = field(default="never", metadata=option("When."))
    mode: Mode = field(default=Mode.FAST, metadata=option("A mode."))
    names: list[str] = field(default_factory=list, metadata=option("Names."))
    betas: tuple[float, float] = field(default=(0.9, 0.99), metadata=option("Betas."))
    skip: Sequence[str] = field(default=(), metadata=option("Layers."))
    extra: dict[str, Any] = field(default_factory=dict, metadata=option("Anything."))
    weight: Scheme = field(
        default=Scheme(granularity="channel"), metadata=option("Scheme of weights.")
    )
    output: Scheme | None = field(default=None, metadata=option("Scheme of outputs."))
    start: Scheme | int = field(default=0, metadata=option("A number or a scheme."))
    begin: StartAt = field(default=StartAt(step=1), metadata=option("When."))
    stages: tuple[Scheme, ...] = field(default=(), metadata=option("Several."))
    layers: Mapping[str, Scheme | None] = field(default_factory=dict, metadata=option("By name."))
    loss: Soft | Hint = field(default=Soft(temperature=3.0), metadata=registered("The loss."))
    more: tuple[Soft | Hint, ...] = field(default=(), metadata=registered("More losses."))
    teacher: nn.Module | None = field(default=None, metadata=option("A model.", runtime=True))


def build(node: Any, config_class: type[Any] = ExampleConfig, **runtime: Any) -> Any:
    return build_config(
        config_class, node, path="plugins.example", source="recipe.yaml", runtime=runtime
    )


def refused(node: Any, config_class: type[Any] = ExampleConfig, **runtime: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(node, config_class, **runtime)
    return str(caught.value)


def test_an_empty_node_gives_the_defaults() -> None:
    assert build({}) == ExampleConfig()


@pytest.mark.parametrize(
    ("key", "node", "value"),
    [
        ("name", "second", "second"),
        ("count", 5, 5),
        ("rate", 3, 3.0),
        ("limit", 2, 2.0),
        ("limit", None, None),
        ("flag", True, True),
        ("flag", False, False),
        ("text", "${not.resolved}", "${not.resolved}"),
        ("text", "???", "???"),
        ("place", "a/b", "a/b"),
        ("folder", "a/b", Path("a/b")),
        ("kind", "KL", "KL"),
        ("when", "never", "never"),
        ("when", 3, 3),
        ("mode", "EXACT", Mode.EXACT),
        ("names", ["a", "b"], ["a", "b"]),
        ("betas", [1, 2], (1.0, 2.0)),
        ("skip", ["a"], ("a",)),
        ("extra", {"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
        ("weight", {"bits": 4}, Scheme(bits=4, granularity="channel")),
        ("output", {"bits": 4}, Scheme(bits=4)),
        ("output", None, None),
        ("start", 7, 7),
        ("start", {"bits": 4}, Scheme(bits=4)),
        ("begin", {"epoch": 2}, StartAt(epoch=2)),
        ("stages", [{"bits": 4}, {}], (Scheme(bits=4), Scheme())),
        ("layers", {"a": {"bits": 4}, "b.0": None}, {"a": Scheme(bits=4), "b.0": None}),
        ("loss", {"type": "hint", "layer": "x"}, Hint("x")),
        ("loss", {"type": "soft", "weights": [1]}, Soft(3.0, (1.0,))),
        ("loss", {"temperature": 4}, Soft(4.0)),
        ("more", [{"type": "hint", "layer": "x"}, {"type": "soft"}], (Hint("x"), Soft())),
    ],
)
def test_every_kind_of_field(key, node, value) -> None:
    built = getattr(build({key: node}), key)
    assert built == value
    assert type(built) is type(value)


def test_items_have_their_declared_type() -> None:
    assert [type(item) for item in build({"betas": [1, 2]}).betas] == [float, float]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"rate": "abc"}, "plugins.example.rate: expected float, got 'abc'."),
        ({"rate": True}, "plugins.example.rate: expected float, got True."),
        ({"rate": None}, "plugins.example.rate: expected float, got null."),
        ({"rate": {"a": 1}}, "plugins.example.rate: expected float, got {'a': 1}."),
        ({"rate": "${x}"}, "plugins.example.rate: expected float, got '${x}'."),
        ({"count": "???"}, "plugins.example.count: expected int, got '???'."),
        ({"count": 1.5}, "plugins.example.count: expected int, got 1.5."),
        ({"count": True}, "plugins.example.count: expected int, got True."),
        ({"count": [1]}, "plugins.example.count: expected int, got [1]."),
        ({"flag": "yes"}, "plugins.example.flag: expected bool, got 'yes'."),
        (
            {"count": "5"},
            "plugins.example.count: expected int, got the text '5'; write it without quotes",
        ),
        (
            {"betas": [1, "2"]},
            "plugins.example.betas[1]: expected float, got the text '2'; write it without quotes",
        ),
        (
            {"limit": "1e-3"},
            "plugins.example.limit: expected float or null, got the text '1e-3'; write it without",
        ),
        ({"flag": 2}, "plugins.example.flag: expected bool, got 2."),
        ({"flag": "maybe"}, "plugins.example.flag: expected bool, got 'maybe'."),
        ({"limit": "abc"}, "plugins.example.limit: expected float or null, got 'abc'."),
        ({"text": ["a"]}, "plugins.example.text: expected str, got ['a']."),
        (
            {"kind": "Kl"},
            "plugins.example.kind: expected 'CE' or 'KL' or 'MSE', got 'Kl'; "
            "did you mean 'KL'? Valid: CE, KL, MSE.",
        ),
        ({"kind": 3}, "plugins.example.kind: expected 'CE' or 'KL' or 'MSE', got 3."),
        (
            {"mode": "SLOW"},
            "plugins.example.mode: expected 'FAST' or 'EXACT', got 'SLOW'; Valid: EXACT, FAST.",
        ),
        ({"names": "a"}, "plugins.example.names: expected a list, got 'a'."),
        ({"names": [["a"]]}, "plugins.example.names[0]: expected str, got ['a']."),
        ({"betas": [1]}, "plugins.example.betas: expected a list of 2 items, got [1]."),
        ({"betas": [1, "x"]}, "plugins.example.betas[1]: expected float, got 'x'."),
        ({"extra": [1]}, "plugins.example.extra: expected a mapping, got [1]."),
        ({"extra": {1: 2}}, "plugins.example.extra: names must be texts, got 1."),
        ({"weight": 4}, "plugins.example.weight: expected a mapping of options, got 4."),
        (
            {"weight": {"bit": 4}},
            "plugins.example.weight.bit: unknown option; did you mean 'bits'? "
            "Valid: bits, granularity.",
        ),
        (
            {"stages": [{}, {"bits": "x"}]},
            "plugins.example.stages[1].bits: expected int, got 'x'.",
        ),
        ({"start": "x"}, "plugins.example.start: expected a mapping of options or int, got 'x'."),
        ({"layers": {"a": 4}}, "plugins.example.layers.a: expected a mapping of options or null"),
        ({"layers": {"a": {"bit": 4}}}, "plugins.example.layers.a.bit: unknown option"),
        (
            {"loss": {"type": "sofd"}},
            "plugins.example.loss.type: unknown type 'sofd'; did you mean 'soft'? "
            "Valid: hint, soft.",
        ),
        ({"loss": {"type": ["soft"]}}, "plugins.example.loss.type: unknown type ['soft']"),
        ({"loss": "soft"}, "plugins.example.loss: expected a mapping such as {type: soft}, got"),
        (
            {"loss": {"type": "hint"}},
            "plugins.example.loss.layer is required: Which layer to match.",
        ),
        ({"loss": {"type": "soft", "layer": 1}}, "plugins.example.loss.layer: unknown option"),
        ({"more": [{}]}, "plugins.example.more[0].type: type is missing; Valid: hint, soft."),
        (
            {"more": {"type": "soft"}},
            "plugins.example.more: expected a list, got {'type': 'soft'}.",
        ),
        (
            {"teacher": "resnet"},
            "plugins.example.teacher is a live object, which a recipe cannot hold; pass it as a "
            "keyword argument: prepare_compression(model, recipe, teacher=...).",
        ),
        ({"plugin": "x"}, "plugins.example.plugin: unknown option"),
        ({1: "x"}, "plugins.example.1: unknown option"),
        ([], "plugins.example: expected a mapping of options, got []."),
        (None, "plugins.example: expected a mapping of options, got null."),
    ],
)
def test_a_bad_node_is_refused_with_file_and_key_path(node, message) -> None:
    assert refused(node).startswith(f"recipe.yaml: {message}")


def test_unknown_options_show_only_what_a_recipe_may_hold() -> None:
    message = refused({"nmes": 1})
    assert "did you mean 'names'" in message
    assert "'teacher'" not in refused({"techer": 1})


def test_a_long_value_is_shortened() -> None:
    assert len(refused({"rate": "x" * 10_000})) < 200


def test_post_init_errors_keep_their_class_and_gain_file_and_key_path() -> None:
    with pytest.raises(QuantizationError) as caught:
        build({"stages": [{"bits": 4}, {"bits": 1}]})
    expected = "recipe.yaml: plugins.example.stages[1]: bits must be from 2 to 8, got 1."
    assert str(caught.value) == expected
    message = refused({"loss": {"type": "soft", "temperature": math.nan}})
    assert message.startswith("recipe.yaml: plugins.example.loss: Soft.temperature must be a")


def test_errors_of_foreign_configs_are_wrapped() -> None:
    @dataclass(frozen=True)
    class Broken(PluginConfig):
        plugin: ClassVar[str] = "broken"
        kind: int = 0

        def __post_init__(self) -> None:
            if self.kind:
                raise PluginError("no", plugin="broken")
            raise KeyError("oops")

    assert refused({}, Broken).startswith("recipe.yaml: plugins.example: Broken refuses these")
    with pytest.raises(PluginError, match=r"^recipe.yaml: plugins.example: no$") as caught:
        build({"kind": 1}, Broken)
    assert caught.value.plugin == "broken"


def test_runtime_objects_are_passed_by_name_and_kept_as_they_are() -> None:
    teacher = nn.Linear(2, 2)
    assert build({}, teacher=teacher, other=1).teacher is teacher
    assert build({}).teacher is None


@dataclass(frozen=True)
class NeedyConfig(PluginConfig):
    plugin: ClassVar[str] = "needy"
    directory: str = field(metadata=option("Where to write."))
    teacher: nn.Module = field(metadata=option("The teacher.", runtime=True))


def test_required_options_are_named_with_their_help() -> None:
    teacher = nn.Linear(2, 2)
    message = refused({}, NeedyConfig, teacher=teacher)
    assert message == "recipe.yaml: plugins.example.directory is required: Where to write."
    message = refused({"directory": "a"}, NeedyConfig)
    assert "needs the keyword argument prepare_compression(model, recipe, teacher=...)" in message
    assert "The teacher." in message


def test_a_field_that_yaml_cannot_hold_is_a_clear_error() -> None:
    @dataclass(frozen=True)
    class Odd(PluginConfig):
        plugin: ClassVar[str] = "odd"
        layer: nn.Module | None = None

    assert "of type Module cannot be given in a recipe" in refused({"layer": "x"}, Odd)


def test_unresolvable_type_hints_are_a_clear_error() -> None:
    @dataclass(frozen=True)
    class Hidden(PluginConfig):
        plugin: ClassVar[str] = "hidden"
        value: Nowhere = None  # type: ignore[name-defined]  # noqa: F821

    assert "import the names that they use outside of TYPE_CHECKING" in refused({}, Hidden)


def test_the_result_is_frozen_and_shares_nothing_with_the_default() -> None:
    config = build({"weight": {"bits": 4}})
    assert ExampleConfig().weight == Scheme(granularity="channel")
    with pytest.raises(FrozenInstanceError):
        config.weight.bits = 3


def test_describe_shows_live_objects_by_name() -> None:
    described = describe_config(
        ExampleConfig(
            teacher=nn.Linear(2, 2),
            extra={"f": math.sqrt, "c": nn.Linear, "o": nn.ReLU()},
            loss=Hint("x"),
            folder=Path("a") / "b",
        )
    )
    assert described["teacher"] == "Linear"
    assert described["extra"] == {"f": "sqrt", "c": "Linear", "o": "ReLU"}
    assert described["loss"] == {"type": "hint", "layer": "x"}
    assert described["folder"] == "a/b"
    assert described["betas"] == [0.9, 0.99]
    assert described["mode"] == "FAST"
    assert "plugin" not in described
    json.dumps(described)


def test_describe_shows_a_subclass_outside_of_the_registry_by_its_own_name() -> None:
    @dataclass(frozen=True)
    class Mine(Soft):
        pass

    assert describe_config(ExampleConfig(loss=Mine()))["loss"]["type"] == "Mine"


names = st.text(string.printable, max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
schemes = st.builds(Scheme, st.integers(2, 8), st.sampled_from(["tensor", "channel"]))
losses = st.builds(
    Soft,
    st.floats(min_value=1e-3, max_value=1e3),
    st.lists(numbers, max_size=3).map(tuple),
) | st.builds(Hint, names)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
configs = st.builds(
    ExampleConfig,
    name=st.none() | names,
    count=st.integers(),
    rate=numbers,
    limit=st.none() | numbers,
    flag=st.booleans(),
    text=names,
    place=names,
    folder=st.sampled_from([Path("a"), Path("/b/c")]),
    kind=st.sampled_from(["CE", "KL", "MSE"]),
    when=st.just("never") | st.integers(),
    mode=st.sampled_from(Mode),
    names=st.lists(names, max_size=3),
    betas=st.tuples(numbers, numbers),
    skip=st.lists(names, max_size=3).map(tuple),
    extra=st.dictionaries(names, plain, max_size=3),
    weight=schemes,
    output=st.none() | schemes,
    start=st.integers() | schemes,
    begin=st.builds(StartAt, step=st.integers(0)) | st.builds(StartAt, epoch=st.integers(0)),
    stages=st.lists(schemes, max_size=2).map(tuple),
    layers=st.dictionaries(names, st.none() | schemes, max_size=2),
    loss=losses,
    more=st.lists(losses, max_size=2).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(configs)
def test_describing_and_building_are_inverse(config: ExampleConfig) -> None:
    described = describe_config(config)
    node = json.loads(json.dumps(described))
    assert node.pop("teacher") is None
    built = build(node)
    assert built == config
    assert describe_config(built) == described


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(describe_config(ExampleConfig()))), plain))
def test_any_plain_node_builds_or_is_refused_by_our_error(node: dict[str, Any]) -> None:
    try:
        built = build(node)
    except (ConfigError, QuantizationError) as error:
        assert str(error).startswith("recipe.yaml: plugins.example")  # noqa: PT017
    else:
        assert isinstance(built, ExampleConfig)


def test_changing_the_granularity_drops_the_axis_of_the_default() -> None:
    from compression_plugins import QATConfig

    config = build_config(
        QATConfig,
        {"weight": {"granularity": "tensor"}, "overrides": [{"layer": "a", "skip": True}]},
        path="plugins.qat",
        source="recipe.yaml",
        runtime={},
    )
    assert config.weight.axis is None
    bits = build_config(
        QATConfig, {"weight": {"bits": 4}}, path="plugins.qat", source="recipe.yaml", runtime={}
    )
    assert (bits.weight.bits, bits.weight.axis) == (4, 0)
