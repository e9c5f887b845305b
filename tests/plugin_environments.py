"""Fresh environments with a third party's distribution in them, made without network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

# What a user would type, in one process: importing torch takes longer than all else.
USE = """
import sys
import pytest
from compression_manager.cli import main

name, *tests = sys.argv[1:]
assert main(["plugins", name]) == 0
assert main(["check", "recipe.yaml"]) == 0
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir=project", *tests]))
"""


class Environment(NamedTuple):
    """A virtual environment: what this process can import, and one distribution more.

    Attributes:
        folder: where commands run; `project` in it is a copy of the distribution's sources.
    """

    python: Path
    folder: Path

    def run(self, *arguments: str) -> str:
        """Run Python there and return what it printed."""
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def use(self, plugin: str, recipe: str) -> str:
        """List the plugin, check a recipe and run the distribution's own tests."""
        (self.folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        return self.run("-c", USE, plugin, "project/tests")


def install(project: Path, folder: Path) -> Environment:
    """Return an environment in `folder` with the distribution `project` in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    environment = Environment(folder / "venv" / "bin" / "python", folder)
    site = environment.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    ours = sysconfig.get_path("purelib")
    (Path(site) / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    # A copy, since building leaves files beside the sources.
    unwanted = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(project, folder / "project", ignore=unwanted)
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    command = [sys.executable, "-m", "pip", "--python", environment.python, "install", *options]
    subprocess.run([*command, folder / "project"], check=True, timeout=240)
    return environment
