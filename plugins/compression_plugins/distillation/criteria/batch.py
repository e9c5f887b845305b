"""What one loss call is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compression_manager.errors import ConfigError
from compression_manager.models.calling import LABEL_KEYS


@dataclass(frozen=True)
class Batch:
    """The arguments of one `on_after_compute_loss`, and where training stands.

    Attributes:
        input: what the model was called with.
        student_output: what the student returned.
        teacher_output: what the teacher returned; None for self-distillation, unless the loop
            passed something.
        target: labels, or None.
        mask: (batch, sequence), 1 where a position counts, or None.
        num_items: positions or samples of the whole accumulated batch, or None.
        global_step: optimizer steps completed.
        is_training: false while shapes are only checked with example inputs.
        asked: the arguments that losses asked for by `require`.
    """

    input: Any
    student_output: Any
    teacher_output: Any
    target: Tensor | None = None
    mask: Tensor | None = None
    num_items: int | Tensor | None = None
    global_step: int = 0
    is_training: bool = True
    asked: set[str] = field(default_factory=set)

    def labels(self) -> Tensor | None:
        """Return the target, else the labels in the mapping that the model was called with."""
        if self.target is not None or not isinstance(self.input, Mapping):
            return self.target
        found = (self.input.get(key) for key in sorted(LABEL_KEYS))
        return next((value for value in found if isinstance(value, Tensor)), None)

    def require(self, name: str, loss: str) -> Any:
        """Return the argument `name`; `num_items` alone may be left out.

        Raises:
            ConfigError: the loop did not pass it.
        """
        self.asked.add(name)
        value = getattr(self, name)
        if value is None and name != "num_items":
            raise ConfigError(
                f"the distillation loss '{loss}' needs {name}; pass it: "
                f"manager.on_after_compute_loss(inputs, output, loss, {name}=...)."
            )
        return value
