"""How far training has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Position:
    """Where to continue.

    Attributes:
        epoch: the epoch to continue in, from 0.
        step: batches of that epoch that are already consumed.
        global_step: optimizer steps completed since training first began.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
