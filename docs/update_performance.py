"""Put the figures of the benchmarks into docs/explanation/performance.md.

    make bench && make bench-peers
    make performance MACHINE=<a short name of the processor, such as amx>

Copies runs/benchmarks to docs/images/performance/<machine>, and writes the page's blocks anew from
all machines there. Without --machine it only writes the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from performance_tables import RECORDED, Machines, blocks

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "performance.md"
BENCHMARKS = (
    "training_step",
    "inference",
    "inference_profile",
    "hooks",
    "roofline",
    "peers",
    "integer_rule",
    "step_profile",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy the results of this machine if it is named, and write the page's blocks anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", help="copy the results under this name first")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "benchmarks")
    options = parser.parse_args(arguments)
    if options.machine is not None:
        copy_results(options.results, RECORDED / options.machine)
    page = PAGE.read_text(encoding="utf-8")
    for name, content in blocks(recorded(RECORDED)).items():
        page = replaced(page, name, content)
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


def copy_results(results: Path, folder: Path) -> None:
    """Copy what there is of the benchmarks' files and charts."""
    folder.mkdir(parents=True, exist_ok=True)
    # "inference*" finds the files of "inference_profile" as well.
    for path in sorted({path for name in BENCHMARKS for path in results.glob(f"{name}*")}):
        shutil.copyfile(path, folder / path.name)
        print(f"copied {path.name} to {folder}")


def recorded(folder: Path) -> Machines:
    """Return what was measured on which machine."""
    return {
        machine.name: {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(machine.glob("*.json"))
        }
        for machine in sorted(folder.glob("*"))
        if machine.is_dir()
    }


def replaced(page: str, name: str, content: str) -> str:
    """Return the page with another content between the marks of a block."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    main()
