"""Runs a function of a test file in several processes that torch.distributed connects."""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import runpy
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


def on_ranks(function: Callable[[int], Any], folder: Path, ranks: int = 2) -> list[Any]:
    """What `function(rank)` returned on each rank of a gloo group.

    Args:
        function: of the top level of its file; returns tensors, numbers and containers of them.
        folder: empty; the ranks meet there and leave their results.
        ranks: number of processes, with one thread each.
    """
    # One process imports torch, once; every rank is a copy of it.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch"])
    arguments = (inspect.getfile(function), function.__name__, folder, ranks)
    mp.start_processes(_run, arguments, nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@contextlib.contextmanager
def process_group(folder: Path, rank: int = 0, ranks: int = 1) -> Iterator[None]:
    """A gloo group that meets in a file of `folder`; by default of this process alone."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timeout=TIMEOUT, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _run(rank: int, file: str, name: str, folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    # pytest imports test files under names that other processes do not know.
    function = runpy.run_path(file)[name]
    with process_group(folder, rank, ranks):
        torch.save(function(rank), folder / f"{rank}.pt")
