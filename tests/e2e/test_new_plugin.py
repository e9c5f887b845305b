"""What `compression-manager new-plugin` writes is a plugin that works, as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compression_manager.cli import main
from plugin_environments import install

pytestmark = pytest.mark.slow

# torch's own types would take mypy half a minute.
MYPY = """
[mypy]
strict = True
[mypy-torch.*]
follow_imports = skip
# Without torch's types ours are incomplete; an installed package is not reported on either.
[mypy-compression_manager.*]
ignore_errors = True
[mypy-compression_plugins.*]
ignore_errors = True
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    assert main(["new-plugin", "weight_noise", "--directory", str(tmp_path / "project")]) == 0
    return tmp_path / "project"


def test_installed_project_is_listed_and_passes_its_own_tests(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    readme = (project / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    environment = install(project, tmp_path_factory.mktemp("environment"))
    output = environment.use("weight_noise", recipe)
    assert "weight_noise (compression-weight-noise 0.1.0)\n" in output
    assert "  weight_noise:\n    strength: 0.001\n" in output
    assert re.search(r"\d+ passed", output), output
    typed = "import compression_weight_noise as package; print(package.__path__[0])"
    assert (Path(environment.run("-c", typed).strip()) / "py.typed").is_file()


def _check(project: Path, *command: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_project_is_linted_and_formatted(project: Path) -> None:
    _check(project, "ruff", "check", "--no-cache", ".")
    _check(project, "ruff", "format", "--no-cache", "--check", ".")


def test_project_is_typed(project: Path) -> None:
    (project / "mypy.ini").write_text(MYPY)
    sources = Path(__file__).parents[2]
    path = os.pathsep.join(str(sources / root) for root in ("compression", "plugins"))
    _check(project, "mypy", "src", "tests", MYPYPATH=f"src{os.pathsep}{path}")
