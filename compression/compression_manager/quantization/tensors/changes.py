"""What shows that a tensor was written to.

Autograd counts, but not everywhere: fused optimizers, collectives, numpy and what is written
through `.data` leave no trace in its counter. A sample of the values sees them.
"""

from __future__ import annotations

from torch import Tensor

from compression_manager.sampling import sample

_SAMPLED = 32


def version_of(tensor: Tensor) -> int:
    """Return autograd's count of changes; 0 for inference tensors, which it does not count."""
    return 0 if tensor.is_inference() else tensor._version


def sample_of(tensor: Tensor) -> list[float]:
    """Return values from all over a tensor on the CPU; an accelerator is not waited for."""
    return sample(tensor, _SAMPLED) if tensor.is_cpu else []
