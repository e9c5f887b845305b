import math

import pytest

from compression_manager.configuration.checks import (
    require_choice,
    require_fraction,
    require_integer,
    require_not_negative,
    require_positive,
    require_type,
)
from compression_manager.errors import ConfigError


class CheckpointConfig:
    pass


OWNER = CheckpointConfig()
NO_NUMBERS = [True, False, "1", None, math.nan, math.inf, -math.inf, [1], 1j]


def test_the_message_names_class_field_rule_and_value() -> None:
    with pytest.raises(ConfigError) as caught:
        require_integer(OWNER, "keep_best_n", 0, minimum=1)
    expected = "CheckpointConfig.keep_best_n must be an integer of at least 1, got 0."
    assert str(caught.value) == expected


def test_the_owner_may_be_given_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^Scheme\.bits must be an integer from 2 to 8, got 9"):
        require_integer("Scheme", "bits", 9, minimum=2, maximum=8)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (require_positive, [1, 0.5, 1e-30], [0, -1, -0.5, *NO_NUMBERS]),
        (require_not_negative, [0, 0.0, 3], [-1, -1e-9, *NO_NUMBERS]),
        (require_fraction, [0, 0.5, 1], [-0.1, 1.1, *NO_NUMBERS]),
        (require_integer, [0, -3, 10**30], [1.0, *NO_NUMBERS]),
    ],
)
def test_numbers(check, good, bad) -> None:
    for value in good:
        check(OWNER, "value", value)
    for value in bad:
        with pytest.raises(ConfigError, match=r"CheckpointConfig\.value must be"):
            check(OWNER, "value", value)


@pytest.mark.parametrize(("value", "fits"), [(1, False), (2, True), (8, True), (9, False)])
def test_integer_limits_are_included(value, fits) -> None:
    if fits:
        require_integer(OWNER, "bits", value, minimum=2, maximum=8)
    else:
        with pytest.raises(ConfigError, match="from 2 to 8"):
            require_integer(OWNER, "bits", value, minimum=2, maximum=8)


@pytest.mark.parametrize("value", ["Kl", 3, None, ["CE"]])
def test_a_wrong_choice_shows_the_nearest_names(value) -> None:
    require_choice(OWNER, "loss_type", "KL", ["CE", "KL"])
    with pytest.raises(ConfigError, match=r"loss_type got .*Valid: CE, KL\."):
        require_choice(OWNER, "loss_type", value, ["CE", "KL"])


def test_types() -> None:
    require_type(OWNER, "metric", "accuracy", (str, type(None)))
    with pytest.raises(ConfigError, match=r"metric must be of type str or None, got 3\."):
        require_type(OWNER, "metric", 3, (str, type(None)))


def test_a_long_value_is_not_spelled_out() -> None:
    with pytest.raises(ConfigError, match=r"got a list\."):
        require_type(OWNER, "metric", list(range(1000)), str)
