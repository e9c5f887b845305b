"""When something starts: at an optimizer step or at an epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from compression_manager.errors import ConfigError
from compression_manager.plugin import option


@dataclass(frozen=True)
class StartAt:
    """A point in training: a number of completed optimizer steps, or an epoch.

    Exactly one of the two is set.
    """

    # `{epoch: 2}` in a recipe must not keep the step of a default `StartAt(step=1)`.
    replaces_default: ClassVar[bool] = True

    step: int | None = field(
        default=None, metadata=option("Completed optimizer steps at which it starts.")
    )
    epoch: int | None = field(default=None, metadata=option("Epoch (from 0) in which it starts."))

    def __post_init__(self) -> None:
        given = [value for value in (self.step, self.epoch) if value is not None]
        if len(given) != 1 or type(given[0]) is not int or given[0] < 0:
            raise ConfigError(
                "a starting point takes either step or epoch, a whole number from 0; "
                f"got step={self.step!r}, epoch={self.epoch!r}."
            )

    def reached(self, *, global_step: int, epoch: int) -> bool:
        """Return whether training has come this far."""
        if self.step is not None:
            return global_step >= self.step
        return self.epoch is not None and epoch >= self.epoch
