"""The losses that can be chosen by name, and how a chosen one is called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from compression_manager.errors import ConfigError, suggest
from compression_plugins.distillation import losses
from compression_plugins.distillation.criteria.batch import Batch

# What a loss is given besides the two outputs, if its signature names it.
_FROM_BATCH = ("target", "mask", "num_items")
_GIVEN = frozenset({*_FROM_BATCH, "temperature"})

Agreement = Literal["everything", "positions", "samples"]


@dataclass(frozen=True)
class CatalogEntry:
    """A built-in loss.

    Attributes:
        function: `loss(student, teacher, ...)`, returns a scalar.
        agreement: in what both shapes must agree: everything; all but the channels; or only the
            number of samples.
        has_softmax: whether it compares distributions over the classes, the last dimension.
    """

    function: Callable[..., Tensor]
    agreement: Agreement = "everything"
    has_softmax: bool = False


CATALOG: dict[str, CatalogEntry] = {
    "CE": CatalogEntry(losses.soft_cross_entropy, has_softmax=True),
    "KL": CatalogEntry(losses.kd_loss, has_softmax=True),
    "MSE": CatalogEntry(losses.mse_loss),
    "L1": CatalogEntry(losses.l1_loss),
    "DKD": CatalogEntry(losses.dkd_loss, has_softmax=True),
    "DIST": CatalogEntry(losses.dist_loss, has_softmax=True),
    "reverse_KL": CatalogEntry(losses.reverse_kl_loss, has_softmax=True),
    "JS": CatalogEntry(losses.jensen_shannon_loss, has_softmax=True),
    "contrastive": CatalogEntry(losses.contrastive_loss),
    "attention_transfer": CatalogEntry(losses.attention_transfer_loss, "positions"),
    "similarity_preserving": CatalogEntry(losses.similarity_preserving_loss, "samples"),
    "rkd_distance": CatalogEntry(losses.rkd_distance_loss, "samples"),
    "rkd_angle": CatalogEntry(losses.rkd_angle_loss, "samples"),
}


def make_loss(name: str, options: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Return `CATALOG[name]` with `options`; a temperature that it lacks is left out.

    Raises:
        ConfigError: it has no such option.
    """
    function = CATALOG[name].function
    valid = set(list(inspect.signature(function).parameters)[2:]) - set(_FROM_BATCH)
    given = {key: value for key, value in options.items() if key != "temperature" or key in valid}
    unknown = sorted(set(given) - valid)
    if unknown:
        raise ConfigError(
            f"the distillation loss '{name}' has no option '{unknown[0]}'; "
            f"{suggest(unknown[0], valid)}"
        )
    return functools.partial(function, **given)


class NamedLoss:
    """A loss that some plugin offers under a name, called with what its signature asks for.

    Args:
        name: the name it was chosen by.
        function: `loss(student, teacher)`; may also take `target`, `mask`, `num_items` and
            `temperature`.
    """

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        self.name = name
        self._function = function
        self._takes = _GIVEN & set(inspect.signature(function).parameters)

    @property
    def is_builtin(self) -> bool:
        """Whether it is one of ours: a third party may answer to a name of ours, too."""
        builtin = CATALOG.get(self.name)
        made = inspect.unwrap(self._function)
        return builtin is not None and getattr(made, "func", None) is builtin.function

    @property
    def agreement(self) -> Agreement:
        """In what both shapes must agree; of a third party's loss, in everything."""
        return CATALOG[self.name].agreement if self.is_builtin else "everything"

    @property
    def has_softmax(self) -> bool:
        """Whether it needs to know which dimension holds the classes; of ours only."""
        return self.is_builtin and CATALOG[self.name].has_softmax

    @property
    def can_be_tried(self) -> bool:
        """Whether it may be computed once more to see if it can: has no state, needs no labels."""
        return self.is_builtin and not self._takes & set(_FROM_BATCH)

    @property
    def takes_temperature(self) -> bool:
        """Whether it is given the temperature at each call, so that this may change."""
        return "temperature" in self._takes

    def __call__(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float | Tensor | None
    ) -> Tensor:
        """Return the loss.

        Args:
            student: what is compared of the student.
            teacher: the same of the teacher, without gradient.
            batch: where the loss's further arguments come from.
            temperature: of this call, if it takes one; None leaves the one it was made with.

        Raises:
            ConfigError: the loop left out an argument that the loss needs.
        """
        further = {
            name: batch.require(name, self.name) for name in _FROM_BATCH if name in self._takes
        }
        if temperature is not None and "temperature" in self._takes:
            further["temperature"] = temperature
        return self._function(student, teacher.detach(), **further)
