"""Self-distillation: shallow parts of the student learn from its deep ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from compression_manager.errors import ConfigError, blame_option, suggest
from compression_manager.plugin import option
from compression_plugins.distillation.criteria.base import Surroundings
from compression_plugins.distillation.criteria.batch import Batch
from compression_plugins.distillation.criteria.feature_config import (
    FeatureCriterionConfig,
    feature_at,
)
from compression_plugins.distillation.criteria.features import FeatureComparison
from compression_plugins.distillation.criteria.mappings import (
    LayerMapping,
    TapPoint,
    parse_mapping,
)
from compression_plugins.distillation.criteria.recorder import Recorder
from compression_plugins.distillation.outputs import pick_feature


@dataclass(frozen=True)
class SelfKnowledgeDistillationLossConfig(FeatureCriterionConfig):
    """Be your own teacher: `task_loss + sum of w_g * D_g(shallow, deep)`, without a teacher model.

    Source: Zhang et al. 2019, "Be Your Own Teacher", section 3. The names, and the groups of
    pairs with a loss and a weight for each group, are Neural Compressor's; there, each pair counts
    again with every one after it.
    """

    needs_teacher: ClassVar[bool] = False

    layer_mappings: Sequence[Any] = field(
        metadata=option(
            "Groups of pairs [[shallow, deep], ...]. Each name is a layer of the student, or an "
            "entry of the mapping that the student returns or the loop passes as teacher_output; "
            "or [name, output] with the index, key or function of the output."
        )
    )
    loss_types: str | Sequence[str] = field(
        default="KL",
        metadata=option("Loss of all groups, or of each; as of intermediate layers, or 'CE'."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_entries(len(self.groups))

    @property
    def groups(self) -> tuple[tuple[LayerMapping, ...], ...]:
        """`layer_mappings`, read."""
        return _parse_groups(self.layer_mappings)

    def compare(self, surroundings: Surroundings) -> FeatureComparison:
        """Return the comparison, with the student's layers watched."""
        pairs = self.make_pairs(surroundings, self.groups)
        layers = {name for name, _ in surroundings.student.named_modules()} - {""}
        recorder = Recorder(
            surroundings.student,
            (
                point.layer
                for pair in pairs
                for point in (pair.mapping.student, pair.mapping.teacher)
                if point.layer in layers
            ),
            surroundings.hooks,
            where="student",
        )

        def feature(batch: Batch, point: TapPoint) -> Tensor:
            if point.layer in layers or not point.layer:
                return feature_at(point, batch.student_output, recorder, "student")
            named = _named_output(point.layer, batch, surroundings.student)
            return pick_feature(named, point.output, where=point.within("student"))

        return FeatureComparison(
            pairs,
            lambda batch, mapping: feature(batch, mapping.student),
            lambda batch, mapping: feature(batch, mapping.teacher),
            (recorder,),
            temperature=self.temperature,
            class_dimension=self.class_dimension,
        )


def _parse_groups(value: object) -> tuple[tuple[LayerMapping, ...], ...]:
    owner = "SelfKnowledgeDistillationLossConfig.layer_mappings"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
        raise ConfigError(
            f"{owner} must be a list of groups of pairs, for example "
            f"[[['head1', 'head3'], ['head2', 'head3']]], got {value!r}."
        )
    groups = []
    for index, group in enumerate(value):
        if isinstance(group, (str, bytes)) or not isinstance(group, Sequence) or not group:
            raise ConfigError(f"{owner}[{index}] must be a list of pairs, got {group!r}.")
        pairs = []
        for number, pair in enumerate(group):
            place = f"{owner}[{index}][{number}]"
            mapping = parse_mapping(place, pair)
            if mapping.student == mapping.teacher:
                raise ConfigError(f"{place}: {mapping.student} would learn from itself.")
            pairs.append(mapping)
        groups.append(tuple(pairs))
    return tuple(groups)


def _named_output(name: str, batch: Batch, student: nn.Module) -> Any:
    """Return the entry `name` of what the student returned or the loop passed."""
    known = [name for name, _ in student.named_modules() if name]
    for outputs in (batch.teacher_output, batch.student_output):
        if isinstance(outputs, Mapping):
            if name in outputs:
                return outputs[name]
            known += [str(key) for key in outputs]
    with blame_option("criterion.layer_mappings"):
        raise ConfigError(
            f"'{name}' is neither a layer of the student nor an entry of its output; "
            f"{suggest(name, known)}"
        )
