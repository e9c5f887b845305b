"""Put the last demo's table and chart into README.md.

    make demo SEEDS=3 && make readme

Keeps the figures in docs/images/demo.json, so that a test can compare README.md with them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"

sys.path.insert(0, str(ROOT / "examples"))

import demo_summary  # noqa: E402  (lies beside the example, which is no package)


def main() -> None:
    """Copy summary and chart of `runs/demo`, and write the README's block anew."""
    output = ROOT / "runs" / "demo"
    IMAGES.mkdir(exist_ok=True)
    shutil.copyfile(output / "summary.json", IMAGES / "demo.json")
    shutil.copyfile(output / "summary.png", IMAGES / "demo.png")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{block()}\n{END}{after}", encoding="utf-8")


def block() -> str:
    """Return the README's block for the figures in docs/images/demo.json."""
    summary = json.loads((IMAGES / "demo.json").read_text(encoding="utf-8"))
    table = demo_summary.format_table(summary, summary["seeds"])
    bars = "\n".join(demo_summary.describe_bars(summary["bars"]))
    chart = "![Accuracy against the size of the saved model](docs/images/demo.png)"
    return f"\n{table}\n\n```text\n{bars}\n```\n\n{chart}\n"


if __name__ == "__main__":
    main()
