"""When something starts."""

from __future__ import annotations

from typing import Any

import pytest

from compression_manager import ConfigError
from compression_manager.training.schedule import StartAt


@pytest.mark.parametrize(
    ("start", "global_step", "epoch", "expected"),
    [
        (StartAt(step=0), 0, 0, True),
        (StartAt(step=3), 2, 9, False),
        (StartAt(step=3), 3, 0, True),
        (StartAt(epoch=0), 0, 0, True),
        (StartAt(epoch=2), 99, 1, False),
        (StartAt(epoch=2), 0, 2, True),
    ],
)
def test_reached(start: StartAt, global_step: int, epoch: int, expected: bool) -> None:
    assert start.reached(global_step=global_step, epoch=epoch) is expected


@pytest.mark.parametrize(
    "options",
    [{}, {"step": 1, "epoch": 1}, {"step": -1}, {"epoch": -1}, {"step": 1.5}, {"epoch": "1"},
     {"step": True}],
)  # fmt: skip
def test_unfit(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="either step or epoch"):
        StartAt(**options)
