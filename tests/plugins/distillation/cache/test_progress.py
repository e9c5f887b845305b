"""A build shows a bar in a terminal, and nothing elsewhere."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest

from cached_teachers import built, counting_teacher


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_in_a_terminal_goes_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    threads = threading.active_count()
    built(tmp_path / "cache", counting_teacher())
    assert "caching the teacher:" in shown.getvalue()
    assert "| 7/7 [" in shown.getvalue()
    assert threading.active_count() == threads


def test_nothing_in_a_log_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    built(tmp_path / "cache", counting_teacher())
    assert capfd.readouterr() == ("", "")
