"""The Makefile's commands: what they set up, when they do so again, and what they run."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("constraints.txt", "setup.cfg", "pyproject.toml")
# `make test` itself runs these tests: what it was called with must not reach them.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "SEEDS", "DATA", "PYTHON"}
}
# Stands for the interpreter: writes down its arguments, and copies itself into a new environment.
PYTHON = """#!/bin/sh
echo "python $*" >> "{log}"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""


class Checkout:
    """A folder with the Makefile and what it depends on; nothing is installed for real."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls.log"
        for name in ("Makefile", *SOURCES):
            shutil.copyfile(ROOT / name, folder / name)
            os.utime(folder / name, (1, 1))
        self.python = folder / "stub-python"
        self.python.write_text(PYTHON.format(log=self.log))
        self.python.chmod(0o755)

    def make(self, *arguments: str) -> list[str]:
        """Return what the interpreters were called with."""
        self.log.write_text("")
        command = ["make", *arguments, f"PYTHON={self.python}"]
        subprocess.run(
            command, cwd=self.folder, env=ENVIRONMENT, check=True, capture_output=True, timeout=60
        )
        return self.log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_venv_installs_the_pinned_versions_once(checkout: Checkout) -> None:
    create, torch, package = checkout.make("venv")
    assert create == "python -m venv .venv"
    assert re.search(r"-m pip install .*--constraint constraints\.txt torch$", torch)
    assert re.search(r"-m pip install .*--constraint constraints\.txt --editable", package)
    assert package.endswith(".[dev,examples]")
    assert checkout.make("venv") == []


@pytest.mark.parametrize("changed", SOURCES)
def test_venv_is_updated_when_what_it_is_made_from_changes(
    checkout: Checkout, changed: str
) -> None:
    checkout.make("venv")
    later = time.time() + 10
    os.utime(checkout.folder / changed, (later, later))
    calls = checkout.make("venv")
    assert ["venv" in call for call in calls] == [False, False]
    assert all("pip install" in call for call in calls)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), "--seeds 1"),
        (("SEEDS=3",), "--seeds 3"),
        (("DATA=some folder",), "--seeds 1 --data some folder"),
    ],
)
def test_demo_sets_up_and_runs_the_script_with_its_recipe(
    checkout: Checkout, arguments: tuple[str, ...], options: str
) -> None:
    *setup, run = checkout.make("demo", *arguments)
    assert len(setup) == 3
    script = "examples/distill_and_quantize.py examples/recipes/distill_and_quantize.yaml"
    assert run == f"python {script} {options}"


def test_the_benchmark_sets_up_and_runs_its_script(checkout: Checkout) -> None:
    *setup, run = checkout.make("bench-distillation")
    assert len(setup) == 3
    assert run == "python tests/benchmarks/distillation_step.py"
    assert (ROOT / run.split()[1]).is_file()


def test_test_and_test_slow_set_up_and_run_every_test(checkout: Checkout) -> None:
    *setup, run = checkout.make("test")
    assert len(setup) == 3
    assert run == "python -m pytest -n 2"  # setup.cfg holds back the slow ones alone
    # Compilers take longer than all other slow tests; `make conformance` has them.
    compilers = "--ignore tests/conformance/test_compilers.py"
    assert checkout.make("test-slow") == [f"python -m pytest -n 2 -m slow {compilers} tests"]
    assert checkout.make("conformance") == ["python -m pytest -m  tests/conformance"]
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["tool:pytest"]["testpaths"] == "tests"
    _, _, selected = config["tool:pytest"]["addopts"].partition("-m ")
    assert selected == '"not slow"'


def test_check_lints_types_packages_and_example_and_imports() -> None:
    command = ["make", "--dry-run", "check"]
    output = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=60
    ).stdout
    tools = re.findall(r"^\.venv/bin/(\S+(?: \w+)?)", output, flags=re.MULTILINE)
    assert {"ruff check", "ruff format", "mypy", "lint-imports"} <= set(tools)
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["mypy"].getboolean("strict")
    assert config["mypy"]["packages"].split(", ") == [
        "compression_manager",
        "compression_plugins",
        "compression_magnitude_pruning",
    ]


def test_ci_stops_at_the_first_command_that_fails(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "Makefile").write_text("test:\n\t@echo tested; exit 1\ncheck:\n\t@echo checked\n")
    result = subprocess.run(
        [tmp_path / ".ci" / "run"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode != 0
    assert "tested" in result.stdout
    assert "checked" not in result.stdout


def test_only_few_packages_are_needed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = {re.split(r"[<>=]", line)[0] for line in config["options"]["install_requires"].split()}
    # pyyaml comes with omegaconf and numpy with tensorboard, see docs/explanation/decisions.md.
    assert needed == {
        "torch",
        "pluggy",
        "omegaconf",
        "tensorboard",
        "numpy",
        "safetensors",
        "tqdm",
        "ninja",
        "pyyaml",
    }
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().split("\n")}
    assert needed <= {name.lower() for name in pinned}
