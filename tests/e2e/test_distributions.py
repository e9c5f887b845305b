"""Wheel and sdist hold both packages, and what is installed from them works outside of the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOURCES = {"compression_manager": "compression", "compression_plugins": "plugins"}
# What setuptools needs of the tree; a build writes beside its sources.
TREE = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", *SOURCES.values())

BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # which the first build overwrites
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""

USE = """
import gzip  # needs the standard library's compression package on Python 3.14
import sys
import torch
from torch import nn

from compression_manager import deploy, prepare_compression
from compression_plugins import DistillationConfig, QATConfig
import compression_manager, compression_plugins

for package in (compression_manager, compression_plugins):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
teacher, model = nn.Linear(4, 3), nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = [(torch.randn(8, 4), torch.randint(3, (8,)))] * 3
with prepare_compression(model, [DistillationConfig(teacher), QATConfig()]) as manager:
    manager.track(optimizer=optimizer)
    for epoch in manager.epochs(1):
        for step, (inputs, targets) in manager.steps(data):
            output = model(inputs)
            loss = nn.functional.cross_entropy(output, targets)
            manager.on_after_compute_loss(inputs, output, loss).backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
    int8 = manager.convert()
    folder = manager.save_converted(sys.argv[2])
assert torch.equal(deploy.load(folder, nn.Linear(4, 3))(data[0][0]), int8(data[0][0]))
"""


def _run(*arguments: str, cwd: Path, python: str = sys.executable, **environment: str) -> str:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={**outside, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both from a copy of the tree; return their folder."""
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in TREE:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tree / name, **({"ignore": ignored} if source.is_dir() else {}))
    _run("-c", BUILD, str(built), cwd=tree)
    return built


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder, without what it depends on; return the folder."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = distributions.glob("*.whl")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    _run(*pip, str(wheel), cwd=distributions)
    return folder


def _expected(package: str, source: str) -> set[str]:
    root = ROOT / source
    folder = root / package
    patterns = ("*.py", "templates/*", "native/*.cpp", "native/*.h")
    modules = [path for pattern in patterns for path in folder.rglob(pattern)]
    return {f"{package}/py.typed", *(str(path.relative_to(root)) for path in modules)}


def test_the_wheel_holds_every_module_and_type_information(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if ".dist-info/" not in name}
    expected = set().union(*(_expected(*item) for item in SOURCES.items()))
    assert expected - modules == set()
    assert {name.split("/")[0] for name in modules} == set(SOURCES)


def test_the_sdist_holds_every_module_and_type_information(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for package, source in SOURCES.items():
        missing = {f"{source}/{name}" for name in _expected(package, source)} - names
        assert missing == set()


def test_the_installed_wheel_trains_converts_and_loads(installed: Path, tmp_path: Path) -> None:
    int8 = str(tmp_path / "int8")
    _run("-c", USE, str(installed), int8, cwd=tmp_path, PYTHONPATH=str(installed))


def test_the_command_line_of_the_installed_wheel_lists_the_plugins(
    installed: Path, tmp_path: Path
) -> None:
    output = _run("-m", "compression_manager", "plugins", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "distillation" in output
    assert "qat" in output


@pytest.mark.parametrize("working_directory", ["elsewhere", "the sources"])
def test_a_standard_library_package_of_the_name_does_no_harm(
    installed: Path, tmp_path: Path, working_directory: str
) -> None:
    """As on Python 3.14; the working directory comes before the standard library."""
    package = tmp_path / "library" / "compression"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "zstd.py").write_text("ORIGIN = 'standard library'\n")
    script = "from compression import zstd\nassert zstd.ORIGIN == 'standard library'\n" + USE
    _run(
        "-c",
        script,
        str(installed),
        str(tmp_path / "int8"),
        cwd=ROOT if working_directory == "the sources" else tmp_path,
        PYTHONPATH=os.pathsep.join([str(package.parent), str(installed)]),
    )


def test_the_installed_wheel_works_on_python_3_14(installed: Path, tmp_path: Path) -> None:
    """Its standard library has the package that the test above imitates."""
    python = shutil.which("python3.14")
    needed = "import omegaconf, pluggy, safetensors, tensorboard, torch, tqdm"
    if python is None or subprocess.run([python, "-c", needed], check=False).returncode:
        pytest.skip("no python3.14 with what the package depends on")
    int8 = str(tmp_path / "int8")
    _run("-c", USE, str(installed), int8, cwd=ROOT, python=python, PYTHONPATH=str(installed))
