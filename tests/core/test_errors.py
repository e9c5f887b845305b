"""What plugins build their messages from."""

from __future__ import annotations

import pytest

from compression_manager import ConfigError, blame_option, suggest


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
