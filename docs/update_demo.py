"""Put the figures of the last demo into README.md, and those of the last study into its page.

    make demo SEEDS=3 && make study DATA=<folder> && make readme

Keeps them in docs/images/*.json, so that a test can compare the pages with them.
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
import quantization_study  # noqa: E402

STUDY_PAGE = ROOT / "docs" / "explanation" / "quantization-study.md"


def main() -> None:
    """Copy the summaries and charts that there are in `runs`, and write the pages' blocks anew."""
    IMAGES.mkdir(exist_ok=True)
    for name, page, content in (
        ("demo", ROOT / "README.md", block),
        ("study", STUDY_PAGE, study_block),
    ):
        output = ROOT / "runs" / name
        if not (output / "summary.json").exists():
            print(f"{page.name} stays as it is: {output} holds no finished run")
            continue
        shutil.copyfile(output / "summary.json", IMAGES / f"{name}.json")
        shutil.copyfile(output / "summary.png", IMAGES / f"{name}.png")
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        page.write_text(f"{before}{BEGIN}\n{content()}\n{END}{after}", encoding="utf-8")


def study_block() -> str:
    """Return the study page's block for the figures in docs/images/study.json."""
    summary = json.loads((IMAGES / "study.json").read_text(encoding="utf-8"))
    chart = "![Paired differences with their intervals](../images/study.png)"
    return f"\n{quantization_study.to_markdown(summary)}\n{chart}\n"


def block() -> str:
    """Return the README's block for the figures in docs/images/demo.json."""
    summary = json.loads((IMAGES / "demo.json").read_text(encoding="utf-8"))
    table = demo_summary.format_table(summary, summary["seeds"])
    bars = "\n".join(demo_summary.describe_bars(summary["bars"]))
    chart = "![Accuracy against the size of the saved model](docs/images/demo.png)"
    return f"\n{table}\n\n```text\n{bars}\n```\n\n{chart}\n"


if __name__ == "__main__":
    main()
