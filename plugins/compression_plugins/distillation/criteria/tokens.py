"""Tokens: language models are compared at every position that counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from compression_manager.configuration.checks import (
    require_choice,
    require_integer,
    require_positive,
    require_type,
)
from compression_manager.errors import ConfigError
from compression_manager.loss import LossTerms
from compression_manager.plugin import option
from compression_plugins.distillation import losses as loss_functions
from compression_plugins.distillation.classes import require_classes
from compression_plugins.distillation.criteria.base import (
    Comparison,
    CriterionConfig,
    Surroundings,
)
from compression_plugins.distillation.criteria.batch import Batch
from compression_plugins.distillation.criteria.logits import check_loss_weights, check_same_logits
from compression_plugins.distillation.criteria.schedules import (
    SCHEDULES,
    Schedule,
    require_temperature,
    value_at,
    weight_at,
)

DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": loss_functions.token_kl_loss,
    "reverse_kl": loss_functions.token_reverse_kl_loss,
    "jensen_shannon": loss_functions.token_jensen_shannon_loss,
}


@dataclass(frozen=True)
class TokenDistillationLossConfig(CriterionConfig):
    """Language models: `w0 * task_loss + w1 * T^2 * mean over the counted positions of D`.

    Logits are (batch, sequence, vocabulary). The positions that count are those with `mask` 1; the
    loop passes `mask`, or the labels as `target`, or calls the model with a mapping that holds
    `labels`. With gradient accumulation, pass `num_items`, the number of counted positions of
    the whole accumulated batch: the loss is then that of the batch as a whole.
    """

    task_weight_option: ClassVar[str] = "loss_weights[0]"

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = field(
        default="forward_kl",
        metadata=option("D: KL(teacher || student), KL(student || teacher), or between the two."),
    )
    temperature: float | Schedule = field(
        default=1.0,
        metadata={**option("T: divides both logits. Or a schedule."), "registry": SCHEDULES},
    )
    loss_weights: tuple[float, float | Schedule] = field(
        default=(0.5, 0.5),
        metadata={
            **option("w0 and w1: weights of the task's loss and of D; w1 may be a schedule."),
            "registry": SCHEDULES,
        },
    )
    beta: float = field(
        default=0.5, metadata=option("Of 'jensen_shannon': the teacher's share of the mixture.")
    )
    shift: bool = field(
        default=False,
        metadata=option(
            "Whether position t predicts label t + 1, as in causal language models whose labels "
            "are the inputs; concerns masks that are made from labels."
        ),
    )
    ignore_index: int = field(default=-100, metadata=option("Label of positions that count not."))
    vocabulary: Literal["same", "common"] = field(
        default="same",
        metadata=option(
            "'same' refuses vocabularies of different size; 'common' compares the first entries "
            "that both have, for one that was only padded."
        ),
    )
    chunk_size: int | None = field(
        default=None,
        metadata=option("Entries of the vocabulary computed at once, which bounds the memory."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "divergence", self.divergence, DIVERGENCES)
        require_temperature(self, "temperature", self.temperature)
        check_loss_weights(self, self.loss_weights)
        require_positive(self, "beta", self.beta)
        if self.beta >= 1:
            raise ConfigError(
                f"TokenDistillationLossConfig.beta must be below 1, got {self.beta!r}; at its ends "
                "the divergence is 0: choose 'forward_kl' or 'reverse_kl' instead."
            )
        require_type(self, "shift", self.shift, bool)
        require_integer(self, "ignore_index", self.ignore_index)
        require_choice(self, "vocabulary", self.vocabulary, ("same", "common"))
        if self.chunk_size is not None:
            require_integer(self, "chunk_size", self.chunk_size, minimum=1)

    @property
    def task_weight(self) -> float:
        """Factor of the task's own loss."""
        return self.loss_weights[0]

    def compare(self, surroundings: Surroundings) -> TokenComparison:
        """Return the comparison of both models' logits at the counted positions."""
        return TokenComparison(self, surroundings)


class TokenComparison(Comparison):
    """Adds the term `<prefix>/<divergence>`."""

    def __init__(self, config: TokenDistillationLossConfig, surroundings: Surroundings) -> None:
        self._config = config
        self._surroundings = surroundings

    def check(self, batch: Batch) -> None:
        """Refuse logits that are not those of the same tokens."""
        self._logits(batch)

    def add_terms(self, batch: Batch, losses: LossTerms, prefix: str) -> None:
        """Add the weighted divergence at the counted positions."""
        config = self._config
        student, teacher = self._logits(batch)
        counted = counted_positions(batch, student, config)
        num_items = batch.require("num_items", config.divergence)
        options: dict[str, Any] = {"num_items": num_items, "chunk_size": config.chunk_size}
        if config.divergence == "jensen_shannon":
            options["beta"] = config.beta
        value = DIVERGENCES[config.divergence](
            student,
            teacher.detach(),
            counted,
            temperature=value_at(config.temperature, batch.global_step, teacher),
            **options,
        )
        weight = weight_at(config.loss_weights[1], batch.global_step, teacher, counted)
        losses.add(f"{prefix}/{config.divergence}", value, weight)

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        student = self._surroundings.student_logits(batch.student_output)
        teacher = self._surroundings.teacher_logits(batch.teacher_output)
        if student.dim() != 3:
            raise ConfigError(
                "token distillation compares logits of shape (batch, sequence, vocabulary), the "
                f"student's have shape {tuple(student.shape)}; use KnowledgeDistillationLossConfig "
                "for one prediction per sample."
            )
        if student.shape[:-1] == teacher.shape[:-1] and student.shape[-1] != teacher.shape[-1]:
            if self._config.vocabulary == "same":
                raise ConfigError(
                    f"student and teacher have vocabularies of {student.shape[-1]} and "
                    f"{teacher.shape[-1]} entries. If the first entries of both mean the same and "
                    "one is only padded, set vocabulary='common'; otherwise give both models the "
                    "same tokenizer."
                )
            common = min(student.shape[-1], teacher.shape[-1])
            student, teacher = student[..., :common], teacher[..., :common]
        check_same_logits(student, teacher)
        require_classes(student, self._config.class_dimension, self._config.divergence)
        return student, teacher


def counted_positions(batch: Batch, logits: Tensor, config: TokenDistillationLossConfig) -> Tensor:
    """Return the mask of the positions that count, (batch, sequence) bool.

    Raises:
        ConfigError: there is neither a mask nor are there labels, or their shape is another one.
    """
    if batch.mask is not None:
        mask, name = batch.mask != 0, "mask"
    else:
        labels = _labels(batch)
        mask, name = labels != config.ignore_index, "labels"
        if config.shift and mask.dim() == 2:
            mask = mask.roll(-1, 1)
            mask[:, -1] = False
    if mask.shape != logits.shape[:-1]:
        raise ConfigError(
            f"the {name} have shape {tuple(mask.shape)}, the logits' positions "
            f"{tuple(logits.shape[:-1])}; both are (batch, sequence)."
        )
    return mask.to(logits.device)


def _labels(batch: Batch) -> Tensor:
    labels = batch.labels()
    if labels is None:
        raise ConfigError(
            "token distillation needs to know which positions count, or it would learn from "
            "padding; pass mask=... (1 where a position counts; torch.ones(batch, sequence) for "
            "all) or target=labels to manager.on_after_compute_loss, or call the model with a "
            "mapping that holds 'labels'."
        )
    return labels
