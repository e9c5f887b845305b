"""What criteria of features have in common: a loss and a weight for each entry of a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compression_manager.configuration.checks import require_type
from compression_manager.errors import ConfigError
from compression_manager.plugin import option
from compression_plugins.distillation.criteria.base import CriterionConfig, Surroundings
from compression_plugins.distillation.criteria.features import FeaturePair
from compression_plugins.distillation.criteria.logits import check_loss_options, named_loss
from compression_plugins.distillation.criteria.mappings import LayerMapping, TapPoint
from compression_plugins.distillation.criteria.recorder import Recorder
from compression_plugins.distillation.criteria.schedules import (
    SCHEDULES,
    Schedule,
    require_temperature,
    require_weight,
)
from compression_plugins.distillation.outputs import pick_feature


@dataclass(frozen=True)
class FeatureCriterionConfig(CriterionConfig):
    """Base of the criteria that compare layers."""

    layer_mappings: Sequence[Any] = field(metadata=option("What is compared."))
    loss_types: str | Sequence[str] = field(
        default="MSE",
        metadata=option(
            "Loss of all entries, or of each: 'MSE', 'L1', 'attention_transfer', "
            "'similarity_preserving', 'rkd_distance', 'rkd_angle', 'contrastive', 'KL' or another "
            "loss of logits (see class_dimension), or one that a plugin offers."
        ),
    )
    loss_weights: float | Schedule | Sequence[float | Schedule] | None = field(
        default=None,
        metadata={
            **option("Weight of all entries, or of each; default: 1 / number of entries."),
            "registry": SCHEDULES,
        },
    )
    add_origin_loss: bool = field(
        default=True, metadata=option("Whether the task's own loss is part of the sum.")
    )
    temperature: float | Schedule = field(
        default=1.0,
        metadata={
            **option("T of the losses that know one, such as 'contrastive' (about 0.1) and 'KL'."),
            "registry": SCHEDULES,
        },
    )
    loss_options: Mapping[str, Any] = field(
        default_factory=dict, metadata=option("Further options of the losses.")
    )

    @property
    def task_weight(self) -> float | None:
        """0 if the task's own loss is to be left out; other plugins may weight it otherwise."""
        return None if self.add_origin_loss else 0.0

    def check_entries(self, count: int) -> None:
        """Check all options of this class, for a list of `count` entries.

        Raises:
            ConfigError: one is invalid.
        """
        object.__setattr__(self, "layer_mappings", tuple(self.layer_mappings))
        self._check_each("loss_types", count, _require_name)
        if self.loss_weights is not None:
            self._check_each("loss_weights", count, require_weight)
        require_type(self, "add_origin_loss", self.add_origin_loss, bool)
        require_temperature(self, "temperature", self.temperature)
        check_loss_options(self, self.loss_options)

    def make_pairs(
        self, surroundings: Surroundings, entries: Sequence[Sequence[LayerMapping]]
    ) -> list[FeaturePair]:
        """Return what is compared; the mappings of an entry share its loss and weight.

        Raises:
            ConfigError: nobody offers a loss, or it lacks an option.
        """
        count = len(entries)
        types = _one_for_each(self.loss_types, count)
        equal = 1.0 / count
        weights = _one_for_each(equal if self.loss_weights is None else self.loss_weights, count)
        pairs: list[FeaturePair] = []
        for index, (name, weight, mappings) in enumerate(zip(types, weights, entries, strict=True)):
            loss = named_loss(
                surroundings, name, self.temperature, self.loss_options, ".loss_types"
            )
            for mapping in mappings:
                unique = _unique_name(f"{name}/{mapping.name}", pairs)
                option = f"criterion.layer_mappings[{index}]"
                pairs.append(FeaturePair(mapping, loss, weight, unique, option))
        return pairs

    def _check_each(
        self, field: str, count: int, check: Callable[[object, str, object], None]
    ) -> None:
        value = getattr(self, field)
        if not isinstance(value, (list, tuple)):
            check(self, field, value)
            return
        object.__setattr__(self, field, tuple(value))
        if len(value) != count:
            raise ConfigError(
                f"{type(self).__name__}.{field} has {len(value)} entries for {count} "
                "layer_mappings; give one for each, or a single one for all."
            )
        for index, item in enumerate(value):
            check(self, f"{field}[{index}]", item)


def feature_at(point: TapPoint, model_output: Any, recorder: Recorder, where: str) -> Tensor:
    """Return the feature at `point`: of the model's own output, or of a layer's that was kept."""
    output = recorder.output(point.layer, model_output) if point.layer else model_output
    return pick_feature(output, point.output, where=point.within(where))


def _require_name(owner: object, field: str, value: object) -> None:
    require_type(owner, field, value, str)


def _one_for_each(value: Any, count: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * count


def _unique_name(name: str, pairs: Sequence[FeaturePair]) -> str:
    """Return `name`, numbered if one of `pairs` has it already."""
    taken = {pair.name for pair in pairs}
    number, unique = 2, name
    while unique in taken:
        unique = f"{name}_{number}"
        number += 1
    return unique
