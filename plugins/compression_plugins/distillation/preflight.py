"""What is looked at once, before the first update of a training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compression_manager.errors import ConfigError
from compression_plugins.distillation.criteria import CriterionConfig, TokenDistillationLossConfig
from compression_plugins.distillation.criteria.batch import Batch

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
        target: class indices (*); negative ones do not count.
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
    target = target.cpu()
    right = [(item.detach().argmax(-1).cpu() == target)[target >= 0] for item in logits]
    only_student = int((right[0] & ~right[1]).sum())
    only_teacher = int((right[1] & ~right[0]).sum())
    if only_student - only_teacher <= _SIGNIFICANT * math.sqrt(only_student + only_teacher):
        return
    shares = [float(item.float().mean()) for item in right]
    warnings.warn(
        f"plugin '{plugin}': on the first batch the teacher is right in {shares[1]:.1%} of "
        f"{len(right[0])} cases and the student in {shares[0]:.1%}. Was the teacher trained, and "
        "does it get its inputs in the form that it knows (normalization, size, order of classes)?",
        stacklevel=2,
    )


def comparable_labels(batch: Batch, criterion: CriterionConfig) -> Tensor | None:
    """Return the labels (*) for logits (*, classes), or None if there are none or it is unclear.

    A mapping's labels of sequences may belong to the same or to the next position, which only the
    criterion for tokens knows.
    """
    labels = batch.labels()
    if labels is None or labels.dim() < 2:
        return labels
    if not isinstance(criterion, TokenDistillationLossConfig):
        return batch.target
    if not criterion.shift:
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], criterion.ignore_index)], 1)


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
