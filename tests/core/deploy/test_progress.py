"""A bar in a terminal, one line without."""

from __future__ import annotations

import io

import pytest

from compression_manager.deploy.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_step_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress("exporting", total=2) as begin:
        begin("tracing")
        assert terminal.getvalue().split("\r")[-1].startswith("exporting: 1/2, tracing")
        begin("comparing")
        assert terminal.getvalue().split("\r")[-1].startswith("exporting: 2/2, comparing")


def test_without_a_terminal_a_line_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with progress("exporting", total=2) as begin:
        assert stream.getvalue() == "exporting ...\n"
        begin("tracing")
    assert stream.getvalue() == "exporting ...\n"
