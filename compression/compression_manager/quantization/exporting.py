"""Whether torch.export is tracing, and what it is to see of the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

View = Literal["operators", "eight bits", "formulas"]

# A plain global, because strict tracing can read no context variable.
_view: View = "operators"


def is_exporting() -> bool:
    """Return whether the code runs, or is traced, for torch.export.

    Before torch 2.13, `torch.compiler.is_exporting` says yes inside of torch.compile too; the flag
    behind it does not.
    """
    flag: bool = getattr(torch.compiler, "_is_exporting_flag", False)
    return flag


def exports_operators(*, eight_bits: bool) -> bool:
    """Return whether torch.export is to see one operator for a function of the arithmetic.

    Args:
        eight_bits: whether the arguments are those of 8-bit kernels: float32 numbers, and integers
            of a `kernel_range`, or a symmetric int8 weight.
    """
    return is_exporting() and (_view == "operators" or (_view == "eight bits" and eight_bits))


@contextmanager
def exporting(view: View) -> Iterator[None]:
    """Choose what torch.export sees within a block.

    Args:
        view: `operators`, one for each function of the arithmetic; `formulas`, the arithmetic
            itself; or `eight bits`, operators for what 8-bit kernels compute and formulas for all
            else.
    """
    global _view
    before, _view = _view, view
    try:
        yield
    finally:
        _view = before
