"""What calibration shows on stderr."""

import io
import re
from types import SimpleNamespace

import pytest
import torch

import toys
from compression_manager import ConfigError, prepare_compression
from compression_plugins import PTQConfig

BATCHES = list(toys.vectors().tensors[0].split(8))
# pytest puts its own sys.stderr back between fixtures and tests.
STREAMS = "compression_plugins.fake_quant.calibration_run.sys"


class Stream(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def terminal(monkeypatch):
    stream = Stream(terminal=True)
    monkeypatch.setattr(STREAMS, SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def log(monkeypatch):
    stream = Stream(terminal=False)
    monkeypatch.setattr(STREAMS, SimpleNamespace(stderr=stream))
    return stream


def lines(stream):
    return [re.split(r"\r", line)[-1] for line in stream.getvalue().strip().split("\n")]


def calibrate(data=BATCHES, **options):
    prepare_compression(toys.mlp(), [PTQConfig(calibration_data=data, **options)])


def test_without_a_terminal_each_run_is_one_line(log):
    calibrate(bias_correction=True)
    assert log.getvalue() == "ptq: calibration: done\nptq: bias correction: done\n"


def test_a_terminal_gets_a_bar_of_batches_and_one_of_layers(terminal):
    calibrate(bias_correction=True)
    calibration, correction = lines(terminal)
    assert calibration.startswith("ptq: calibration: 100%")
    assert "4/4" in calibration
    assert correction.startswith("ptq: bias correction: 100%")
    assert "2/2" in correction


@pytest.mark.parametrize(
    ("data", "limit", "shown"),
    [(BATCHES, 3, "3/3"), (BATCHES, 9, "4/4"), (iter(BATCHES), 2, "2/2")],
    ids=["fewer", "all", "unknown length"],
)
def test_the_bar_knows_its_end(terminal, data, limit, shown):
    calibrate(data, calibration_batches=limit)
    assert shown in lines(terminal)[-1]


def test_data_of_unknown_length_is_counted(terminal):
    calibrate(batch for batch in BATCHES)
    assert "ptq: calibration: 4batch" in lines(terminal)[-1]


def test_an_error_ends_the_bar(terminal):
    with pytest.raises(ConfigError):
        calibrate([*BATCHES, torch.zeros(1, 2)])
    assert "4/5" in lines(terminal)[-1]
    assert terminal.getvalue().endswith("\n")


def test_an_error_does_not_look_like_an_end(log):
    with pytest.raises(ConfigError):
        calibrate([*BATCHES, torch.zeros(1, 2)])
    assert log.getvalue() == ""


def test_without_data_nothing_is_shown(log):
    prepare_compression(toys.mlp(), [PTQConfig("dynamic")])
    assert log.getvalue() == ""
