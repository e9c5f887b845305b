"""What the loop passes, and how Neural Compressor 2.6 picks from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.errors import ConfigError, suggest
from compression_manager.models.calling import call_model, without_labels

# 2.6 takes rows for distributions if their sums differ from 1 by no more.
_TOLERANCE = 0.2


class PassedOutputs:
    """The teacher's output that the loop passed to the present loss call, or None."""

    def __init__(self) -> None:
        self.teacher_output: Any = None

    def teacher_forward(self, teacher: nn.Module, inputs: Any) -> Any:
        """Return what the loop passed, and else what the teacher says."""
        if self.teacher_output is not None:
            return self.teacher_output
        return call_model(teacher, without_labels(inputs))


@dataclass(frozen=True)
class NamedOutput:
    """Picks an entry of the dictionary that the loop passes; divided by `divisor`."""

    name: str
    passed: PassedOutputs = field(compare=False, repr=False)
    divisor: float = 1.0

    def __call__(self, student_output: Any) -> Tensor:
        """Return the entry.

        Raises:
            ConfigError: neither of the loop's dictionaries has it.
        """
        known: list[str] = []
        for outputs in (student_output, self.passed.teacher_output):
            if isinstance(outputs, Mapping):
                if self.name in outputs:
                    output: Tensor = outputs[self.name]
                    return output if self.divisor == 1.0 else output / self.divisor
                known += map(str, outputs)
        raise ConfigError(
            f"SelfKnowledgeDistillationLossConfig.layer_mappings names '{self.name}', which is no "
            "entry of the dictionary that on_after_compute_loss got as student_output or "
            f"teacher_output; {suggest(self.name, known)}"
        )


@dataclass(frozen=True)
class AsLogits:
    """Picks a layer's output for 'KL': log(p) where its rows are distributions p already."""

    output: int | str | Callable[[Any], Any] | None

    def __call__(self, layer_output: Any) -> Tensor:
        """Return what a softmax turns into the distributions that are meant."""
        feature: Tensor = self._pick(layer_output)
        with torch.no_grad():
            is_distribution = feature.min() >= 0 and (feature.sum(-1) - 1).abs().max() <= _TOLERANCE
        if not is_distribution:
            return feature
        return feature.clamp_min(torch.finfo(feature.dtype).tiny).log()

    def _pick(self, layer_output: Any) -> Any:
        if callable(self.output):
            return self.output(layer_output)
        if self.output is None:
            return layer_output if isinstance(layer_output, Tensor) else layer_output[0]
        return layer_output[self.output]
