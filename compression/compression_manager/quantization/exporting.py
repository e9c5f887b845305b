"""Whether torch.export is tracing, and what it is to see of the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A plain global, because strict tracing can read no context variable.
_formulas = False


def is_exporting() -> bool:
    """Return whether the code runs, or is traced, for torch.export.

    Before torch 2.13, `torch.compiler.is_exporting` says yes inside of torch.compile too; the flag
    behind it does not.
    """
    flag: bool = getattr(torch.compiler, "_is_exporting_flag", False)
    return flag


def exports_operators() -> bool:
    """Return whether torch.export is to see one operator for each function of the arithmetic."""
    return is_exporting() and not _formulas


@contextmanager
def exporting_formulas() -> Iterator[None]:
    """Let torch.export trace the arithmetic itself, instead of the operators that stand for it."""
    global _formulas
    before, _formulas = _formulas, True
    try:
        yield
    finally:
        _formulas = before
