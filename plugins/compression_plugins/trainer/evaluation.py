"""The task's loss, and what is measured on the validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.errors import ConfigError
from compression_manager.models.calling import call_model, quiet_evaluation
from compression_plugins.distillation.outputs import find_logits
from compression_plugins.trainer.batches import unpack

Criterion = Callable[[Any, Any], Tensor]
Metrics = Callable[[nn.Module, Any], Mapping[str, float]]

# Of the default metrics: whether lower is better.
DEFAULT_METRICS = {"loss": True, "accuracy": False}

# torch's value for a target that does not count.
_IGNORED = -100


def cross_entropy(output: Any, targets: Any) -> Tensor:
    """Return the mean cross-entropy of a model's logits and integer classes, a scalar.

    Args:
        output: what the model returned; its logits (*, classes) are the output itself, its
            `logits`, or its first element.
        targets: integer classes (*); -100 does not count.

    Raises:
        ConfigError: the targets are no classes for such logits.
    """
    logits = _logits(output)
    if not _are_classes(targets, logits):
        got = (
            f"of shape {tuple(targets.shape)} and dtype {targets.dtype}"
            if isinstance(targets, Tensor)
            else f"in a {type(targets).__name__}"
        )
        raise ConfigError(
            "without criterion=..., the loss is the cross-entropy of logits (*, classes) and "
            f"integer targets (*); got logits of shape {tuple(logits.shape)} and targets {got}. "
            "For another task pass criterion=function(output, targets)."
        )
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), ignore_index=_IGNORED)


def measure(
    model: nn.Module, loader: Iterable[Any], criterion: Criterion, device: torch.device | None
) -> dict[str, float]:
    """Return `loss`, the task's mean over all samples, and for classes the `accuracy`.

    Both weight each sample alike, however many are in its batch; for targets (batch, sequence)
    each position that counts. The model is expected in eval mode, without gradient.
    """
    loss, right, counted = 0.0, 0, 0
    has_classes = True
    for item in loader:
        batch = unpack(item, source="validation_loader", device=device)
        output = call_model(model, batch.inputs)
        predictions = _predictions(output, batch.targets)
        if predictions is None:
            has_classes, weight = False, _length(batch.targets)
        else:
            valid = batch.targets.long() != _IGNORED  # in uint8, -100 would be class 156
            right += int((predictions.eq(batch.targets) & valid).sum())
            weight = int(valid.sum())
        if weight:
            loss += float(criterion(output, batch.targets)) * weight
            counted += weight
    if counted == 0:
        raise ConfigError("validation_loader is empty, or none of its targets counts.")
    accuracy = {"accuracy": right / counted} if has_classes else {}
    return {"loss": loss / counted, **accuracy}


def evaluate(model: nn.Module, metrics: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Return what `metrics` returns, called in eval mode; modes and random state stay.

    Raises:
        ConfigError: it is no mapping of names to numbers.
    """
    with quiet_evaluation(model):
        values = metrics()
    if not isinstance(values, Mapping):
        raise ConfigError(
            "metrics(model, loader) returns a mapping of names to numbers, for example "
            f"{{'accuracy': 0.91}}; got {type(values).__name__}."
        )
    try:
        return {str(name): float(value) for name, value in values.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"metrics(model, loader) returned no numbers: {error}") from error


def _logits(output: Any) -> Tensor:
    return find_logits(output, None, where="student", owner="train", option="criterion")


def _are_classes(targets: Any, logits: Tensor) -> bool:
    return (
        isinstance(targets, Tensor)
        and not targets.is_floating_point()
        and not targets.is_complex()
        and targets.dtype != torch.bool
        and logits.dim() > 1
        and targets.shape == logits.shape[:-1]
    )


def _predictions(output: Any, targets: Any) -> Tensor | None:
    """Return the predicted classes if the targets are classes."""
    try:
        logits = _logits(output)
    except ConfigError:
        return None
    return logits.argmax(-1) if _are_classes(targets, logits) else None


def _length(targets: Any) -> int:
    return len(targets) if isinstance(targets, (Tensor, list, tuple)) else 1
