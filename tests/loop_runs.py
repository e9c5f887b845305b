"""Loops over `epochs` and `steps`, wrapped in what users wrap loops in, and what they fire."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

import toys
from compression_manager import prepare_compression
from compression_manager.testing import RecordingPlugin

BATCHES = ["a", "b", "c"]
SHORT = {
    "on_train_begin": "T+", "on_epoch_begin": "E+", "on_step_begin": "S+", "on_step_end": "S-",
    "on_epoch_end": "E-", "on_train_end": "T-", "on_exception": "X",
}  # fmt: skip


def _generator(loop: Any) -> Iterator[Any]:
    for item in loop:  # noqa: UP028 (suspended differently from `yield from`)
        yield item


def _owning(loops: list[Any]) -> Iterator[Any]:
    for item in loops.pop():  # noqa: UP028 (no variable holds the loop)
        yield item


def _delegating(loop: Any) -> Iterator[Any]:
    yield from loop


def _numbered(loop: Any) -> Iterator[Any]:
    return (item for _, item in enumerate(loop))


def _same(item: Any) -> Any:
    return item


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda loop: loop,
    "tqdm": functools.partial(tqdm, disable=True),
    "shown tqdm": functools.partial(tqdm, file=io.StringIO()),
    "enumerate": _numbered,
    "zip": lambda loop: (item for item, _ in zip(loop, itertools.count(), strict=False)),
    "map": lambda loop: map(_same, loop),
    "generator": _generator,
    "owning generator": lambda loop: _owning([loop]),
    "yield from": _delegating,
    "both": lambda loop: tqdm(_generator(loop), disable=True),
}


class Run:
    """A manager, and the events that it sent as short text."""

    def __init__(self, *plugins: Any) -> None:
        self._recording = RecordingPlugin()
        self.manager = prepare_compression(toys.mlp(), [self._recording, *plugins])

    @property
    def events(self) -> str:
        return " ".join(SHORT[hook] for hook in self._recording.hooks if hook in SHORT)


STEPS = "S+ S- S+ S- S+ S-"


def run_through(run: Run, *, batches: Any = BATCHES) -> None:
    """Two epochs with nothing in them."""
    for _ in run.manager.epochs(2):
        for _ in run.manager.steps(batches):
            pass
