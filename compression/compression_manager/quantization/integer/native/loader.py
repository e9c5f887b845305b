"""Finds the compiled library, or builds it once for this version of torch and kind of processor."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from compression_manager.errors import ConfigError
from compression_manager.quantization.integer.native import build
from compression_manager.state.files import exclusive, remove_abandoned, temporary

VARIABLE = "COMPRESSION_MANAGER_NATIVE"
# Seconds for a build, or for another process's.
TIME_LIMIT = 120.0
_POLL_SECONDS = 0.1
_SHOWN_LINES = 12

# What is loaded, by the path of the library; a build that failed is not tried again.
_loaded: dict[Path, Library] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Library:
    """The compiled functions, or why there are none.

    Attributes:
        functions: the library; None if there is none.
        reason: why there is none; "" if there is one.
    """

    functions: ctypes.CDLL | None
    reason: str = ""


class _BuildError(Exception):
    """The library cannot be built; the text says why."""


def load_library(*, builds: bool = True) -> Library:
    """Return the compiled library, building it first if there is none yet.

    A build takes some ten seconds, says so on stderr and is kept in the folder in which torch
    keeps extensions (`TORCH_EXTENSIONS_DIR`). Several processes build it once between them. A
    build that fails or exceeds two minutes gives one warning; the lack of a compiler none.

    Args:
        builds: False to take only what was built before.

    Raises:
        ConfigError: the environment variable COMPRESSION_MANAGER_NATIVE is neither 0 nor 1.
    """
    if not is_switched_on():
        return Library(None, f"{VARIABLE}=0 turns the native kernels off")
    if sys.platform != "linux":
        return Library(None, f"native kernels are built on Linux only, not on {sys.platform}")
    with _lock:
        try:
            path = library_path()
        except ImportError as error:
            return Library(None, f"torch's tools to build extensions cannot be imported: {error}")
        if path not in _loaded:
            if not builds and not _is_there(path):
                return Library(None, "the native kernels have not been built")
            _loaded[path] = _find_or_build(path)
        return _loaded[path]


def is_switched_on() -> bool:
    """Return what the environment variable COMPRESSION_MANAGER_NATIVE says; 1 if it is not set.

    Raises:
        ConfigError: it is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ConfigError(
            f"the environment variable {VARIABLE} is {value!r}; valid are 0 (plain torch "
            "operations) and 1 (native kernels where they can be built; also if it is not set)."
        )
    return value == "1"


def library_path() -> Path:
    """Return where the library is, or will be: the name says what it was built for and from."""
    digest = hashlib.sha256()
    for source in build.sources():
        digest.update(source.read_bytes())
    capability = torch.backends.cpu.get_cpu_capability()
    parts = [torch.__version__, platform.machine(), capability, digest.hexdigest()[:12]]
    name = re.sub(r"[^\w.-]", "_", "-".join(["compression_manager", *parts]))
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or _cpp_extension().get_default_build_root()
    return Path(root) / name / f"{build.NAME}.so"


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False  # in a folder of another user


def _find_or_build(path: Path) -> Library:
    try:
        if not path.exists():
            reason = _missing_tool()
            if reason is not None:
                return Library(None, reason)
            with _turn(path, time.monotonic() + TIME_LIMIT):
                if not path.exists():
                    remove_abandoned(path.parent)
                    _build(path)
        return Library(ctypes.CDLL(str(path)))
    except (_BuildError, OSError) as error:
        reason = f"the native kernels cannot be built or loaded: {error}"
        warnings.warn(
            f"{reason}\nPlain torch operations are used, which are slower. {VARIABLE}=0 does "
            "without the attempt.",
            stacklevel=4,
        )
        return Library(None, reason)


def _missing_tool() -> str | None:
    """Return what is missing to build the library, if anything is."""
    compiler = shlex.split(_cpp_extension().get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}) to build the native kernels with"
    if shutil.which("ninja", path=_search_path()) is None:
        return "there is no ninja to build the native kernels with; `pip install ninja`"
    return None


def _cpp_extension() -> ModuleType:
    # Imported late, because it imports setuptools, which takes a third of a second.
    return importlib.import_module("torch.utils.cpp_extension")


def _search_path() -> str:
    # A Python that is called by its path does not have its own scripts, of which ninja is one, in
    # the search path.
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


@contextmanager
def _turn(path: Path, deadline: float) -> Iterator[None]:
    """Hold the library's folder; the system ends the hold of a process that was killed."""
    is_waiting = False
    while True:
        try:
            with exclusive(path.parent):
                yield
                return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _BuildError(
                    f"another process has held {path.parent} for {TIME_LIMIT:.0f} s"
                ) from None
        if not is_waiting:
            _say("waiting for another process that builds the native kernels ...\n")
            is_waiting = True
        time.sleep(_POLL_SECONDS)


def _build(path: Path) -> None:
    """Compile in a folder of its own, so that the library is there whole or not at all."""
    start = time.monotonic()
    _say("building native kernels, once for this version of torch ...")
    outcome = "failed"
    try:
        with temporary(path, Path.mkdir) as folder:
            _compile(folder)
            os.replace(folder / path.name, path)
        outcome = "done"
    finally:
        _say(f" {outcome} after {time.monotonic() - start:.0f} s\n")


def _compile(folder: Path) -> None:
    environment = {
        **os.environ,
        "PATH": _search_path(),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    # -P: the folder of the program is no place to import from.
    command = [sys.executable, "-P", build.__file__, str(folder)]
    # Files, because a pipe that a stopped compiler's children keep open would be read for ever.
    with (folder / "messages").open("w+b") as messages:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            raise _BuildError(f"the compiler took more than {TIME_LIMIT:.0f} s") from None
        finally:
            _stop(process)
        if status != 0:
            messages.seek(0)
            lines = messages.read().decode(errors="replace").splitlines()[-_SHOWN_LINES:]
            raise _BuildError("\n".join(lines) or f"the compiler ended with status {status}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a build that has not ended, with the compilers that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _forget_lock_in_child() -> None:
    # Another thread may have held it when the process was forked.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock_in_child)
