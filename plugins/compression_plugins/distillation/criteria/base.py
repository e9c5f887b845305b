"""What every criterion is made of: its options, and the comparison that they describe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from compression_manager.configuration.checks import require_integer
from compression_manager.errors import CheckpointMismatchError, ConfigError
from compression_manager.loss import LossTerms
from compression_manager.models.hooks import ModelHooks
from compression_manager.plugin import option
from compression_plugins.distillation.criteria.batch import Batch
from compression_plugins.distillation.criteria.catalog import NamedLoss
from compression_plugins.distillation.criteria.recorder import Recorder


@dataclass(frozen=True)
class Surroundings:
    """What a comparison may use of the manager that it works in.

    Attributes:
        student: the model that is trained.
        teacher: the teacher that is run, or None.
        hooks: places forward hooks that close and conversion remove.
        make_loss: `make_loss(name, options, option, known)` returns the loss that some plugin
            offers; for errors, `option` is the criterion's option that chose it, and `known` are
            names that it could have chosen.
        student_logits: the logits in what the student returned, brought to (batch, *, classes).
        teacher_logits: the same of what the teacher returned.
    """

    student: nn.Module
    teacher: nn.Module | None
    hooks: ModelHooks
    make_loss: Callable[[str, Mapping[str, Any], str, Iterable[str]], NamedLoss]
    student_logits: Callable[[Any], Tensor]
    teacher_logits: Callable[[Any], Tensor]


class Comparison(ABC):
    """A criterion at work: compares student and teacher in every loss call.

    Those that train nothing implement `check` and `add_terms` only.

    Attributes:
        recorders: what keeps the outputs of layers; the plugin switches them.
    """

    recorders: tuple[Recorder, ...] = ()

    @abstractmethod
    def check(self, batch: Batch) -> None:
        """Refuse outputs that cannot be compared, and create what has to be trained.

        Called once, with the first outputs that there are.

        Raises:
            ConfigError: says what does not fit.
        """

    @abstractmethod
    def add_terms(self, batch: Batch, losses: LossTerms, prefix: str) -> None:
        """Add the weighted terms of this batch; their names begin with `prefix`."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what `check` or `load_state_dict` created and the optimizer has to train."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointMismatchError: it belongs to another criterion.
        """
        if state:
            raise CheckpointMismatchError(
                "the criterion keeps no state, but the checkpoint holds some for it: "
                f"{', '.join(sorted(state))}."
            )


@dataclass(frozen=True)
class CriterionConfig(ABC):
    """Base of all criteria's options."""

    needs_teacher: ClassVar[bool] = True
    """Whether there has to be somebody else to learn from."""
    needs_teacher_layers: ClassVar[bool] = False
    """Whether the teacher has to be run here, because its layers are watched."""
    task_weight_option: ClassVar[str] = "add_origin_loss"
    """The option that says the weight of the task's own loss, for errors."""

    class_dimension: int | None = field(
        default=None,
        kw_only=True,
        metadata=option(
            "Dimension of the outputs that holds the classes: 1 for images (N, classes, height, "
            "width), -1 for the last; null: the last of outputs with 2 or 3 dimensions, while "
            "losses with a softmax refuse others. It is brought to the end before logits are "
            "compared."
        ),
    )

    def __post_init__(self) -> None:
        if self.class_dimension is None:
            return
        require_integer(self, "class_dimension", self.class_dimension)
        if self.class_dimension == 0:
            raise ConfigError(
                f"{type(self).__name__}.class_dimension is 0, which is the batch; the classes of "
                "images (N, classes, height, width) are dimension 1."
            )

    @property
    @abstractmethod
    def task_weight(self) -> float | None:
        """Factor of the task's own loss; None leaves it to other plugins, and at 1 without any."""

    @abstractmethod
    def compare(self, surroundings: Surroundings) -> Comparison:
        """Return the comparison that the options describe, with its hooks placed.

        Raises:
            ConfigError: a layer or loss does not exist.
        """
