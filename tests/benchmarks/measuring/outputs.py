"""How far an output is from what is expected; needs torch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def relative_error(output: Any, expected: Tensor) -> float:
    """Return the root mean square of the difference, relative to that of `expected`."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    difference = torch.as_tensor(found).double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())
