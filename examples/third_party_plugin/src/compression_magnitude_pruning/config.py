"""Options of magnitude pruning, and the share of zeros that they ask for at any time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from compression_manager import ConfigError, PluginConfig, StartAt, option

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class MagnitudePruningConfig(PluginConfig):
    """Set the weights of smallest magnitude to zero, and keep them there."""

    plugin: ClassVar[str] = "magnitude_pruning"

    sparsity: float = field(
        default=0.5, metadata=option("Share of the weights that ends up zero: 0 to below 1.")
    )
    start: StartAt = field(default=StartAt(step=0), metadata=option("When pruning starts."))
    end: StartAt | None = field(
        default=None,
        metadata=option(
            "When `sparsity` is reached, after growing from `initial_sparsity` along a cubic "
            "curve; null: all at once, at the start."
        ),
    )
    initial_sparsity: float = field(
        default=0.0, metadata=option("Share that is zero at the start, if there is an end.")
    )
    every: int = field(
        default=1,
        metadata=option("Steps, or epochs if `start` counts those, from one pruning to the next."),
    )
    scope: Scope = field(
        default="layer",
        metadata=option(
            "`layer` prunes every weight tensor to the same share; `global` compares magnitudes "
            "over all of them."
        ),
    )
    include: tuple[str, ...] = field(
        default=("*",),
        metadata=option("Weights to prune: names such as `encoder.*.weight`, with wildcards."),
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata=option("Weights to leave alone, named in the same way.")
    )

    def __post_init__(self) -> None:
        _check("sparsity", self.sparsity, "a number from 0 to below 1", _is_share(self.sparsity))
        _check(
            "initial_sparsity",
            self.initial_sparsity,
            f"a number from 0 to sparsity ({self.sparsity})",
            _is_share(self.initial_sparsity) and self.initial_sparsity <= self.sparsity,
        )
        same_unit = self.end is None or (self.end.step is None) == (self.start.step is None)
        _check("end", self.end, "the same unit as start, step or epoch", same_unit)
        later = self.end is None or _number(self.end) > _number(self.start)
        _check("end", self.end, f"a point after the start ({self.start})", later)
        whole = type(self.every) is int and self.every >= 1
        _check("every", self.every, "a whole number from 1", whole)
        scopes = get_args(Scope)
        _check("scope", self.scope, " or ".join(map(repr, scopes)), self.scope in scopes)
        for name, value in (("include", self.include), ("exclude", self.exclude)):
            texts = not isinstance(value, str) and all(isinstance(item, str) for item in value)
            _check(name, value, "a list of names", texts)

    def sparsity_at(self, *, step: int, epoch: int) -> float:
        """Return the share of weights that has to be zero after `step` steps, in `epoch`.

        Between start t0 and end t1, for t = t0, t0 + every, ... (Zhu & Gupta 2017, equation 1):
        sparsity + (initial_sparsity - sparsity) * (1 - (t - t0) / (t1 - t0))^3.
        """
        now = epoch if self.start.step is None else step
        start, end = _number(self.start), _number(self.end or self.start)
        if now < start:
            return 0.0
        if now >= end:
            return self.sparsity
        remaining = 1 - (now - start) // self.every * self.every / (end - start)
        return self.sparsity + (self.initial_sparsity - self.sparsity) * remaining**3


def _number(point: StartAt) -> int:
    return point.step if point.step is not None else point.epoch or 0


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _check(option: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise ConfigError(f"magnitude_pruning: {option} takes {expected}; got {value!r}.")
