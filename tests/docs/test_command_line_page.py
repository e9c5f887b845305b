"""docs/how-to/use-the-command-line.md shows what the command really prints."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from compression_manager import prepare_compression
from compression_manager.cli import main
from compression_manager.quantization import QuantizationScheme
from compression_plugins import CheckpointConfig, QATConfig

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "use-the-command-line.md"
TEXT = PAGE.read_text(encoding="utf-8")


def _commands() -> list[tuple[str, str, int]]:
    """Return each command shown, its output and its exit code (0 unless `echo $?` follows)."""
    found: list[tuple[str, str, int]] = []
    for block in re.findall(r"```console\n(.*?)```", TEXT, flags=re.DOTALL):
        for shown in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = shown.partition("\n")
            if command == "echo $?":
                found[-1] = (*found[-1][:2], int(output))
            else:
                found.append((command, output, 0))
    return found


@pytest.fixture
def _shown_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder with the page's recipe and two runs of one short epoch."""
    monkeypatch.chdir(tmp_path)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    _train("runs", bits=8)
    _train("runs-4-bits", bits=4)


def _train(folder: str, *, bits: int) -> None:
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = QuantizationScheme(bits=bits, granularity="channel")
    configs = [
        QATConfig(weight=weight),
        CheckpointConfig(f"{folder}/checkpoints", metric="accuracy"),
    ]
    with prepare_compression(model, configs) as manager:
        manager.track(optimizer=optimizer)
        for _ in manager.epochs(1):
            for _, (inputs, targets) in manager.steps(toys.loader(toys.vectors())):
                output = model(inputs)
                loss = torch.nn.functional.cross_entropy(output, targets)
                manager.on_after_compute_loss(inputs, output, loss).backward()
                manager.on_before_optimizer_step()
                optimizer.step()
                manager.on_after_optimizer_step()
                optimizer.zero_grad()
            manager.on_before_eval()
            manager.on_after_eval({"accuracy": 0.75})


@pytest.mark.usefixtures("_shown_folder")
@pytest.mark.parametrize(("command", "expected", "code"), _commands())
def test_shown_output_is_the_real_one(command: str, expected: str, code: int, capsys: Any) -> None:
    command, _, limit = command.partition(" | head -n ")
    program, *arguments = shlex.split(command)
    assert program == "compression-manager"
    assert main(arguments) == code
    printed = capsys.readouterr()
    lines = (printed.out + printed.err).splitlines(keepends=True)
    actual = "".join(lines[: int(limit)] if limit else lines)
    checker = doctest.OutputChecker()
    assert checker.check_output(expected, actual, doctest.ELLIPSIS), actual


def test_page_shows_every_command_and_a_failure() -> None:
    shown = _commands()
    commands = {command.split()[1] for command, _, _ in shown}
    assert commands == {"plugins", "check", "inspect", "report", "compare", "new-plugin"}
    assert {code for _, _, code in shown} == {0, 1}
