"""What plugins build their messages from."""

from __future__ import annotations

import inspect
import pickle

import pytest

import compression_manager
from compression_manager import (
    CompressionError,
    ConfigError,
    MissingObjectError,
    PluginError,
    blame_option,
    suggest,
)

ERRORS = [
    value
    for value in vars(compression_manager).values()
    if inspect.isclass(value) and issubclass(value, CompressionError)
]
ARGUMENTS: dict[type[CompressionError], dict[str, str]] = {
    MissingObjectError: {"option": "teacher_model"},
    PluginError: {"plugin": "qat", "hook": "prepare_model"},
}


@pytest.mark.parametrize(
    ("name", "valid", "expected"),
    [
        (
            "temprature",
            ["temperature", "name"],
            "did you mean 'temperature'? Valid: name, temperature.",
        ),
        ("zzz", ["b", "a", "a", ""], "Valid: a, b."),
        ("x", [], "there is none to choose from."),
        ("", map(str, range(10, 30)), "Valid: " + ", ".join(map(str, range(10, 22))) + ", ... (8"),
    ],
)
def test_suggest_names_the_nearest_and_the_valid(
    name: str, valid: list[str], expected: str
) -> None:
    assert suggest(name, valid).startswith(expected)


def test_innermost_option_is_blamed() -> None:
    with pytest.raises(ConfigError) as error, blame_option("rules"), blame_option("rules[0].layer"):
        raise ConfigError("no such layer")
    assert error.value.option == "rules[0].layer"
    assert str(error.value) == "no such layer"


def test_other_exceptions_pass() -> None:
    with pytest.raises(KeyError), blame_option("rules"):
        raise KeyError("x")


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_reach_another_process(kind: type[CompressionError]) -> None:
    """As those of a worker do."""
    error = kind("message", **ARGUMENTS.get(kind, {}))
    error.key_path = "plugins.qat"
    error.args = (f"recipe.yaml: {error}",)
    error.add_note("note")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is kind
    assert str(arrived) == "recipe.yaml: message"
    assert vars(arrived) == vars(error)
