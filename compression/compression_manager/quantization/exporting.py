"""Whether torch.export is tracing."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Return whether the code runs, or is traced, for torch.export.

    Before torch 2.13, `torch.compiler.is_exporting` says yes inside of torch.compile too; the flag
    behind it does not.
    """
    flag: bool = getattr(torch.compiler, "_is_exporting_flag", False)
    return flag
