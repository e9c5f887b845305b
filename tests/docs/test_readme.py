"""README.md: its figures are those of the recorded demo, its commands are those of CI."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_in_the_pages_are_the_recorded_ones() -> None:
    specification = importlib.util.spec_from_file_location(
        "update_demo", ROOT / "docs" / "update_demo.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    blocks = module.blocks()
    assert len(blocks) == 5
    for (page, name), content in blocks.items():
        assert module.block_in(page, name) == f"\n{content}\n", f"{page}, {name}: `make readme`"


def test_recorded_run_has_three_seeds_and_meets_the_bar() -> None:
    recorded = json.loads((ROOT / "docs" / "images" / "demo.json").read_text(encoding="utf-8"))
    assert len(recorded["seeds"]) == 3
    goals = {
        "int8_to_teacher_accuracy": lambda value: value >= 0.98,
        "teacher_to_int8_bytes": lambda value: value >= 20,
        "distilled_minus_student_accuracy": lambda value: value > 0,
        "int8_disagreement_with_fake_quantized": lambda value: value <= 0.001,
    }
    assert [name for name, meets in goals.items() if not meets(recorded["bars"][name])] == []
    assert recorded["teacher"]["parameters"] >= 10 * recorded["student"]["parameters"]


def test_the_loop_has_its_hooks_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    loop = next(block for block in blocks if "manager.on_train_begin()" in block)
    assert re.findall(r"manager\.(on_\w+|convert)\(", loop) == [
        "on_train_begin",
        "on_epoch_begin",
        "on_step_begin",
        "on_after_compute_loss",
        "on_before_optimizer_step",
        "on_after_optimizer_step",
        "on_step_end",
        "on_epoch_end",
        "on_train_end",
        "convert",
    ]


def test_ci_runs_the_test_command_and_then_the_checks() -> None:
    commands = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^make (\S+)$", ci, flags=re.MULTILINE) == ["test", "test-slow", "check"]


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
