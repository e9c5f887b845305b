"""Draw report.png and tensorboard.png in docs/images anew, from the code of their page.

    pip install selenium; python docs/update_pictures.py    # needs chromium and chromedriver

docs/how-to/read-the-report.md tells how to make both by hand.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compression_manager.cli import main as command

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "read-the-report.md"
IMAGES = ROOT / "docs" / "images"
REPORT_SIZE, TENSORBOARD_SIZE = "1080,1932", "1250,1060"
SCALE = 0.8  # a picture stays below 200 kB
STARTING, LOADING = 60, 25  # seconds


def main() -> None:
    """Train as the page does, and take both pictures in a headless browser."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})
        if command(["report", "runs/spirals-4-bits"]) != 0:
            sys.exit(1)
        with _browser(REPORT_SIZE) as browser:
            browser.get(Path("runs/spirals-4-bits/report.html").resolve().as_uri())
            _save(browser, "report.png")
        with _tensorboard("runs") as address, _browser(TENSORBOARD_SIZE) as browser:
            browser.get(f"{address}/?darkMode=false&tagFilter=loss%7Crange#timeseries")
            time.sleep(LOADING)  # charts load one by one; nothing says when all did
            browser.find_element("css selector", ".settings-button").click()
            time.sleep(2)
            _save(browser, "tensorboard.png")


def _save(browser: Any, name: str) -> None:
    browser.save_screenshot(str(IMAGES / name))
    print(f"wrote docs/images/{name}, {(IMAGES / name).stat().st_size:,} bytes")


@contextmanager
def _browser(size: str) -> Iterator[Any]:
    """Yield a headless Chromium that draws WebGL without a GPU."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--hide-scrollbars",
        "--enable-unsafe-swiftshader",
        "--disable-background-networking",
        f"--window-size={size}",
        f"--force-device-scale-factor={SCALE}",
    ):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        yield browser
    finally:
        browser.quit()


@contextmanager
def _tensorboard(folder: str) -> Iterator[str]:
    """Serve a folder's event files; yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--logdir", folder, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *arguments])
    try:
        for _ in range(STARTING):
            time.sleep(1)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
