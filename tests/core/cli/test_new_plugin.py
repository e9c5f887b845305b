"""`compression-manager new-plugin`: names, places and failures. What it writes: see tests/e2e."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compression_manager.cli import main

FILES = [
    "README.md",
    "pyproject.toml",
    "src/compression_weight_noise/__init__.py",
    "src/compression_weight_noise/config.py",
    "src/compression_weight_noise/plugin.py",
    "src/compression_weight_noise/py.typed",
    "tests/test_weight_noise.py",
]


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("directory", [None, "mine", "parent/mine"])
def test_files_and_next_steps(directory: str | None, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "parent").mkdir()
    options = [] if directory is None else ["--directory", directory]
    assert main(["new-plugin", "weight_noise", *options]) == 0
    folder = directory or "compression-weight-noise"
    assert _files(tmp_path / folder) == FILES
    output = capsys.readouterr().out
    assert f"{folder} is written:" in output
    assert all(f"  {name}\n" in output for name in FILES)
    for command in (f"cd {folder}", "pip install", "python -m pytest", "plugins weight_noise"):
        assert command in output
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_group_has_our_version_of_the_hook_api(tmp_path: Path) -> None:
    main(["new-plugin", "weight_noise", "--directory", "mine"])
    project = (tmp_path / "mine" / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."compression_manager.plugins.v1"]' in project


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("WeightNoise", "did you mean 'weight_noise'?"),
        ("weight-noise", "did you mean 'weight_noise'?"),
        ("2_noise", "did you mean 'noise'?"),
        ("_noise_", "did you mean 'noise'?"),
        ("../noise", "did you mean 'noise'?"),
        ("", "such as weight_noise."),
        ("manager", "the package compression_manager, but there is such a package already"),
        ("plugins", "the package compression_plugins, but there is such a package already"),
        ("qat", "a plugin named 'qat' is installed already, by compression-manager."),
    ],
)
def test_unfit_names_are_refused(name: str, hint: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["new-plugin", name]) == 1
    printed = capsys.readouterr()
    assert hint in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_nothing_is_overwritten(kind: str, tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / "mine"
    if kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("precious")
    else:
        place.symlink_to("nowhere")
    assert main(["new-plugin", "weight_noise", "--directory", "mine"]) == 1
    assert "mine exists already; nothing is overwritten." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [place]
    assert kind != "file" or place.read_text() == "precious"
    assert kind != "folder" or list(place.iterdir()) == []


def test_missing_parent_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["new-plugin", "weight_noise", "--directory", "a/b"]) == 1
    assert "a is no folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails_at", range(1, len(FILES) + 1))
def test_failure_leaves_nothing_behind(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    written = []
    write = Path.write_text

    def fail(path: Path, *arguments: Any, **options: Any) -> int:
        written.append(path)
        if len(written) == fails_at:
            raise OSError("no space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    assert main(["new-plugin", "weight_noise"]) == 1
    assert "no space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
