"""A sign of life for people at a terminal, and for nobody else."""

from __future__ import annotations

import io
import sys
import time

import pytest

from compression_manager.cli.waiting import waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_what_is_going_on_and_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with waiting("reading runs/demo", after=0.0):
        deadline = time.monotonic() + 30
        while "reading runs/demo: 00:0" not in terminal.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert terminal.getvalue().endswith("\r")
    assert terminal.getvalue().split("\r")[-2].strip() == ""


def test_what_is_quick_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with waiting("reading"):
        pass
    assert terminal.getvalue() == ""


def test_pipe_and_log_stay_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with waiting("reading", after=0.0):
        time.sleep(0.05)
    assert log.getvalue() == ""


def test_error_of_the_body_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyError), waiting("reading", after=0.0):
        raise KeyError
