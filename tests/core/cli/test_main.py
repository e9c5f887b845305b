"""The command itself: help, exit codes, pipes."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compression_manager import cli
from compression_manager.cli import main
from compression_manager.cli.main import build_parser

ROOT = Path(__file__).parents[3]
COMMANDS = ["plugins", "check", "inspect", "report", "compare"]
RUN = [sys.executable, "-m", "compression_manager"]


def _help(capsys: Any, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_has_an_example_and_the_exit_codes(arguments: list[str], capsys: Any) -> None:
    text = _help(capsys, *arguments)
    assert " ".join(["  compression-manager", *arguments]) in text
    assert "example" in text
    assert "exit codes:" in text


def test_help_lists_every_command(capsys: Any) -> None:
    text = _help(capsys)
    for name in COMMANDS:
        assert f"\n    {name} " in text


def test_every_argument_has_help() -> None:
    parsers = [build_parser()]
    while parsers:
        for action in parsers.pop()._actions:
            assert action.help or action.choices, action
            if isinstance(action.choices, dict):
                parsers += action.choices.values()


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["check"], ["plugins", "--yaml"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "usage: compression-manager" in printed.err


def test_installed_command_is_this_function() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    scripts = setup["options.entry_points"]["console_scripts"].split()
    assert scripts == ["compression-manager", "=", "compression_manager.cli:main"]
    assert cli.main is main


@pytest.mark.parametrize(
    "arguments",
    [["plugins"], ["check", str(ROOT / "examples" / "recipes" / "distill_and_quantize.yaml")]],
    ids=["longer than a buffer", "shorter"],
)
def test_module_runs_and_survives_a_closed_pipe(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [*RUN, *arguments],
            # Without a buffer nothing would be left to flush at exit.
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert ended.stderr == ""
    assert ended.returncode == 0


def test_module_exits_with_the_code(tmp_path: Path) -> None:
    recipe = tmp_path / "récipe.yaml"
    recipe.write_text("plugins: {progress: {description: é}}", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [*RUN, "check", str(recipe)], env=environment, capture_output=True, check=False
    )
    assert ended.stderr == b""
    assert ended.returncode == 0
    assert b"description: \\xe9" in ended.stdout
    ended = subprocess.run(
        [*RUN, "check", str(recipe), "plugins.none.a=1"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stdout == b""
    assert b"lists no plugin 'none'" in ended.stderr
