"""What is looked at once, before the first update of a training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

from torch import Tensor, nn

from compression_manager.errors import ConfigError

# In standard deviations: a few unlucky samples are no reason to warn.
_SIGNIFICANT = 3.0


def warn_if_worse(
    target: Tensor,
    *,
    student: Callable[[], Tensor],
    teacher: Callable[[], Tensor],
    plugin: str,
) -> None:
    """Warn if the teacher classifies a batch significantly worse than the student.

    Significant by McNemar's test: of the samples that only one of them gets right, b are the
    student's and c the teacher's, and b - c > 3 * sqrt(b + c).

    Args:
        target: class indices (*).
        student: returns logits (*, classes); or raises ConfigError where the model has none.
        teacher: likewise.
        plugin: instance name, for the message.
    """
    try:
        logits = student(), teacher()
    except ConfigError:
        return  # only features are compared
    is_class_index = not target.is_floating_point() and target.shape == logits[0].shape[:-1]
    if not is_class_index or logits[0].shape != logits[1].shape or target.numel() == 0:
        return
    right = [(item.detach().argmax(-1) == target.to(item.device)).cpu() for item in logits]
    only_student = int((right[0] & ~right[1]).sum())
    only_teacher = int((right[1] & ~right[0]).sum())
    if only_student - only_teacher <= _SIGNIFICANT * math.sqrt(only_student + only_teacher):
        return
    shares = [float(item.float().mean()) for item in right]
    warnings.warn(
        f"plugin '{plugin}': on the first batch the teacher is right in {shares[1]:.1%} of "
        f"{target.numel()} cases and the student in {shares[0]:.1%}. Was the teacher trained, and "
        "does it get its inputs in the form that it knows (normalization, size, order of classes)?",
        stacklevel=2,
    )


def describe_memory(student: nn.Module, teacher: nn.Module | None, feature_bytes: int) -> str:
    """Return in words what both models and the kept features take in memory.

    Args:
        student: the model.
        teacher: what is run as the teacher, if anything is.
        feature_bytes: of the layers' outputs that one batch keeps until the loss is computed.
    """
    sizes = {
        "student": _model_bytes(student),
        "teacher": 0 if teacher is None else _model_bytes(teacher),
        "features kept per step": feature_bytes,
    }
    return "memory: " + ", ".join(
        f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items() if size
    )


def _model_bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
