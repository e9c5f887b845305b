"""README.md: its figures are those of the recorded demo, its commands are those of CI."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_demo_block_comes_from_the_recorded_run() -> None:
    specification = importlib.util.spec_from_file_location(
        "update_demo", ROOT / "docs" / "update_demo.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    block = README.split(module.BEGIN)[1].split(module.END)[0]
    assert block == f"\n{module.block()}\n", "run `make demo SEEDS=3 && make readme`"


def test_ci_runs_the_test_command_and_then_the_checks() -> None:
    commands = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^make (\w+)$", ci, flags=re.MULTILINE) == ["test", "check"]


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
