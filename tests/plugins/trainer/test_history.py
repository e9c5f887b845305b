"""The history as text, and which value is better."""

import math

import pytest

from compression_plugins import EpochRecord, TrainingHistory
from compression_plugins.trainer.history import better


def test_prints_as_a_table_that_marks_the_best():
    history = TrainingHistory(
        "f1",
        False,
        {"f1": 0.1},
        (
            EpochRecord(0, 4, {"task": 2.0, "total": 1.5}, {"f1": 0.7}),
            EpochRecord(1, 8, {"task": 1.0, "total": 0.51239}, {"f1": 0.25}),
        ),
        0,
        "enough",
    )
    assert str(history).splitlines() == [
        "epoch  loss/task  loss/total  f1",
        "start                         0.1",
        "0 *    2          1.5         0.7",
        "1      1          0.5124      0.25",
        "best (*): epoch 0, by f1, higher is better",
        "stopped early: enough",
    ]


@pytest.mark.parametrize(
    ("value", "best", "lower_is_better", "expected"),
    [
        (1.0, None, True, True),
        (math.nan, None, True, False),
        (math.nan, 1.0, False, False),
        (1.0, 1.0, True, False),
        (1.0, 1.0, False, False),
        (0.5, 1.0, True, True),
        (0.5, 1.0, False, False),
        (math.inf, 1.0, False, True),
    ],
)
def test_better(value, best, lower_is_better, expected):
    assert better(value, best, lower_is_better=lower_is_better) is expected
