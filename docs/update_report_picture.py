"""Draw docs/images/report.png anew: run the page's own code, and photograph its report.

    python docs/update_report_picture.py    # needs chromium

The pictured report is the one that docs/how-to/read-the-report.md tells how to make.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from compression_manager.cli import main as command

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "read-the-report.md"
PICTURE = ROOT / "docs" / "images" / "report.png"
SIZE = "1080,1770"
SCALE = "0.8"  # the picture stays below 200 kB


def main() -> None:
    """Train, write the report, and take the picture in a headless browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("chromium is needed to take the picture")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})
        if command(["report", "runs/spirals-4-bits"]) != 0:
            sys.exit(1)
        report = Path("runs/spirals-4-bits/report.html").resolve()
        options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={SIZE}"]
        options.append(f"--force-device-scale-factor={SCALE}")
        subprocess.run(
            [browser, *options, f"--screenshot={PICTURE}", report.as_uri()],
            check=True,
            timeout=120,
            stderr=subprocess.DEVNULL,
        )
    print(f"wrote {PICTURE.relative_to(ROOT)}, {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
