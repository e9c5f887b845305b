"""Building, finding and doing without the compiled library."""

from __future__ import annotations

import copy
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from compression_manager.errors import ConfigError, QuantizationError
from compression_manager.quantization.integer.native import NativePasses, build, loader
from compression_manager.quantization.integer.native.loader import load_library

# What a process holds and leaves that is killed while it builds.
HOLD = """
import fcntl, os, sys, time
folder = sys.argv[1]
os.makedirs(folder)
fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
os.mkdir(folder + "/.passes.so.tmp-0123456789abcdef")
print("held", flush=True)
time.sleep(60)
"""
LOAD = """
from compression_manager.quantization.integer.native import load_library
library = load_library()
print("loaded" if library.functions else library.reason)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for torch's extensions, and a loader that has loaded nothing."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delenv(loader.VARIABLE, raising=False)
    monkeypatch.setattr(loader, "_loaded", {})
    return tmp_path / "extensions"


@pytest.fixture
def copied_library(library_file: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Have a build take a copy of the library that there is; the list of such builds."""
    built: list[Path] = []

    def build_copy(path: Path) -> None:
        built.append(path)
        shutil.copy(library_file, path)

    monkeypatch.setattr(loader, "_build", build_copy)
    return built


@pytest.fixture
def holder(cache: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that builds, and never ends, the library that is to be loaded."""
    command = [sys.executable, "-I", "-S", "-c", HOLD, str(loader.library_path().parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_zero_in_the_environment_turns_it_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.VARIABLE, "0")
    assert load_library().functions is None
    with pytest.raises(QuantizationError, match="COMPRESSION_MANAGER_NATIVE=0 turns"):
        NativePasses()
    assert not cache.exists()


@pytest.mark.parametrize("value", ["", "off", "2", "true"])
def test_other_values_in_the_environment_are_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(loader.VARIABLE, value)
    with pytest.raises(ConfigError, match=f"is '{value}'; valid are 0 .* and 1"):
        load_library()


def test_without_a_compiler_there_is_a_reason_and_no_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    library = load_library()
    assert library.functions is None
    assert "no C++ compiler (no-such-compiler)" in library.reason
    assert capsys.readouterr().err == ""
    assert not cache.exists()


def test_without_ninja_there_is_a_reason_and_no_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(loader, "_search_path", lambda: str(tmp_path))
    assert "there is no ninja" in load_library().reason


def test_a_library_that_exists_is_loaded_without_a_compiler(
    passes: NativePasses,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(loader, "_loaded", {})
    start = time.monotonic()
    assert load_library().functions is not None
    assert time.monotonic() - start < 1
    assert capsys.readouterr().err == ""


def test_what_is_not_to_be_built_is_loaded_once_it_was(
    cache: Path, monkeypatch: pytest.MonkeyPatch, copied_library: list[Path]
) -> None:
    library = load_library(builds=False)
    assert (library.functions, library.reason) == (None, "the native kernels have not been built")
    assert not cache.exists()
    assert load_library().functions is not None  # whoever builds them is not kept from it
    monkeypatch.setattr(loader, "_loaded", {})
    assert load_library(builds=False).functions is not None
    assert len(copied_library) == 1


def test_a_folder_of_another_user_holds_nothing_that_was_built(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    assert load_library(builds=False).reason == "the native kernels have not been built"


def test_torch_without_setuptools_has_no_library(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ImportError("No module named 'setuptools'")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(loader, "_cpp_extension", refuse)
    assert "No module named 'setuptools'" in load_library(builds=False).reason


def test_a_failed_build_warns_once_with_what_the_compiler_said(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *-c*) echo no room for this today >&2; exit 1;; *) exec c++ "$@";; esac\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match="(?s)no room for this today.*NATIVE=0") as caught:
        library = load_library()
    assert len(caught) == 1
    assert library.functions is None
    assert "no room for this today" in library.reason
    assert load_library() is library  # neither tried nor warned about again
    assert "building native kernels" in capsys.readouterr().err
    assert list(cache.rglob("*")) == []


def test_a_build_that_takes_too_long_is_stopped_with_all_that_it_started(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "endless.py"
    program.write_text(
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    monkeypatch.setattr(build, "__file__", str(program))
    monkeypatch.setattr(loader, "TIME_LIMIT", 1.0)
    monkeypatch.setattr(loader, "_missing_tool", lambda: None)
    with pytest.warns(UserWarning, match="the compiler took more than 1 s"):
        assert load_library().functions is None
    child = int((tmp_path / "child").read_text())
    assert _ends(child)
    assert list(cache.rglob("*")) == []


def test_the_lock_and_the_remains_of_a_killed_build_do_not_matter(
    cache: Path, holder: subprocess.Popen[str], copied_library: list[Path]
) -> None:
    path = loader.library_path()
    assert [item.name.startswith(".passes.so.tmp-") for item in path.parent.iterdir()] == [True]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert load_library().functions is not None
    assert copied_library == [path]
    assert list(path.parent.iterdir()) == [path]


def test_a_build_of_another_process_is_waited_for_and_used(
    cache: Path,
    holder: subprocess.Popen[str],
    copied_library: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = loader.library_path()

    def finish() -> None:
        loader._build(path)  # the other one's, under its lock
        holder.kill()

    timer = threading.Timer(0.3, finish)
    timer.start()
    assert load_library().functions is not None
    timer.join()
    assert copied_library == [path]
    assert "waiting for another process" in capsys.readouterr().err


def test_a_lock_that_is_never_released_ends_in_a_warning(
    cache: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "TIME_LIMIT", 0.3)
    with pytest.warns(UserWarning, match="another process has held"):
        assert load_library().functions is None


def test_a_file_that_is_no_library_ends_in_a_warning(cache: Path) -> None:
    path = loader.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="cannot be built or loaded: .*passes.so"):
        assert load_library().functions is None


def test_passes_can_be_copied_and_pickled(passes: NativePasses) -> None:
    for copied in (copy.deepcopy(passes), pickle.loads(pickle.dumps(passes))):
        assert copied.relu(torch.tensor([-1.0, 2.0]))[0].tolist() == [0.0, 2.0]


def test_a_forked_process_does_not_wait_for_a_thread_that_it_does_not_have(
    passes: NativePasses,
) -> None:
    with loader._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                os._exit(0 if load_library().functions is not None else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_name_tells_torch_processor_and_sources_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    path = loader.library_path()
    assert torch.backends.cpu.get_cpu_capability().replace(" ", "_") in path.parent.name
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert loader.library_path() != path
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert loader.library_path() != path
    monkeypatch.undo()
    monkeypatch.setattr(build, "sources", lambda: [Path(__file__)])
    assert loader.library_path() != path


@pytest.mark.slow
def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", LOAD],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [output for output, _ in outputs] == ["loaded\n", "loaded\n"]
    assert sum("building native kernels" in messages for _, messages in outputs) == 1
    again = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOAD], capture_output=True, text=True, env=environment
    )
    assert (again.stdout, again.stderr) == ("loaded\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["AVX2", "AVX512", "DEFAULT"])
def test_the_sources_compile_without_warnings_for_every_kind_of_processor(
    capability: str, tmp_path: Path
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the flags are those of x86-64")
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    for source in build.FOLDER.glob("*.cpp"):
        flags = [*build.compiler_flags(capability), "-std=c++20", "-Wall", "-Wextra", "-Werror"]
        flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # in gcc's own headers
        command = [cpp_extension.get_cxx_compiler(), *flags, *includes, "-c", str(source), "-o"]
        subprocess.run([*command, str(tmp_path / "object.o")], check=True)


def _ends(process: int) -> bool:
    """Whether a process is gone within a few seconds; a zombie is."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False
