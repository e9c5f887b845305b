"""The test that the page shows runs, and passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compression_manager.testing import PluginContract

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-plugin.md"


class _Outcomes:
    def __init__(self) -> None:
        self.passed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid.rpartition("::")[2].partition("[")[0])


@pytest.mark.slow
def test_the_contract_on_the_page_passes(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    module = tmp_path / "test_weight_decay_term.py"
    module.write_text("\n".join(blocks), encoding="utf-8")
    outcomes = _Outcomes()
    options = ["-q", "-p", "no:cacheprovider", "-c", str(tmp_path / "none.ini"), str(module)]
    (tmp_path / "none.ini").write_text("[pytest]\n")
    assert pytest.main(options, plugins=[outcomes]) == pytest.ExitCode.OK
    contract = {name for name in dir(PluginContract) if name.startswith("test_")}
    assert set(outcomes.passed) == {*contract, "test_the_term_is_part_of_the_loss"}
