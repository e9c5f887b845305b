"""Put the figures of the last demo, studies and tables into README.md and docs.

    make demo SEEDS=3 && make tables && make study DATA=<folder> && make distillation-study
    make readme

Keeps them in docs/images/*.json, so that a test can compare the pages with them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
HOW_TO = ROOT / "docs" / "how-to"

for folder in (ROOT / "examples", ROOT / "docs"):
    sys.path.insert(0, str(folder))

import generate_distillation  # noqa: E402  (likewise)

import demo_summary  # noqa: E402  (lies beside the example, which is no package)
import post_training_study  # noqa: E402  (likewise)
import quantization_study  # noqa: E402  (likewise)


def main() -> None:
    """Copy the summaries and charts that there are in `runs`, and write the pages' blocks anew."""
    IMAGES.mkdir(exist_ok=True)
    for name in ("demo", "study", "tables", "distillation_study"):
        output = ROOT / "runs" / name.replace("_", "-")
        if not (output / "summary.json").exists():
            print(f"the figures of '{name}' stay as they are: {output} holds no finished run")
            continue
        shutil.copyfile(output / "summary.json", IMAGES / f"{name}.json")
        if (output / "summary.png").exists():
            shutil.copyfile(output / "summary.png", IMAGES / f"{name}.png")
    for (page, name), content in blocks().items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = page.read_text(encoding="utf-8").split(begin)
        after = rest.split(end)[1]
        page.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")
    generate_distillation.main()


def blocks() -> dict[tuple[Path, str], str]:
    """Return (page, name of the block) -> what the recorded figures put there."""
    tables = _recorded("tables")
    pages = {
        "modes": HOW_TO / "quantize-without-training.md",
        "correction": HOW_TO / "quantize-without-training.md",
        "storage": HOW_TO / "shrink-a-trained-model.md",
    }
    return {
        (ROOT / "README.md", "demo"): demo_block(),
        (ROOT / "docs" / "explanation" / "quantization-study.md", "study"): study_block(),
        **{
            (page, name): f"\n{post_training_study.TABLES[name](tables)}\n"
            for name, page in pages.items()
        },
    }


def block_in(page: Path, name: str) -> str:
    """Return what stands between the marks of a block."""
    text = page.read_text(encoding="utf-8")
    return text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]


def _recorded(name: str) -> Any:
    return json.loads((IMAGES / f"{name}.json").read_text(encoding="utf-8"))


def study_block() -> str:
    """Return the study page's block for the figures in docs/images/study.json."""
    summary = _recorded("study")
    chart = "![Paired differences with their intervals](../images/study.png)"
    return f"\n{quantization_study.to_markdown(summary)}\n{chart}\n"


def demo_block() -> str:
    """Return the README's block for the figures in docs/images/demo.json."""
    summary = _recorded("demo")
    table = demo_summary.format_table(summary, summary["seeds"])
    bars = "\n".join(demo_summary.describe_bars(summary["bars"]))
    chart = "![Accuracy against the size of the saved model](docs/images/demo.png)"
    return f"\n{table}\n\n```text\n{bars}\n```\n\n{chart}\n"


if __name__ == "__main__":
    main()
