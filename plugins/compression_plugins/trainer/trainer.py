"""`KnowledgeDistillationTrainer`: a loop that is already written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compression_manager import CompressionManager, prepare_compression
from compression_manager.configuration.checks import MAX_SEED, require_integer, require_type
from compression_manager.errors import ConfigError, LifecycleError
from compression_manager.models.calling import quiet_evaluation
from compression_manager.plugin_host.composition import PluginSpec
from compression_manager.quantization.layers import QuantizedLayer
from compression_manager.tracking.batches import undisturbed
from compression_plugins.checkpoint import CheckpointConfig
from compression_plugins.distillation.outputs import find_logits
from compression_plugins.distillation.teachers.teacher import Teacher
from compression_plugins.early_stopping import EarlyStoppingConfig
from compression_plugins.trainer.batches import check_loader, first_batch
from compression_plugins.trainer.checks import (
    check_folder,
    check_optimizer,
    check_scheduler,
    device_of,
)
from compression_plugins.trainer.composition import (
    check_default_metric,
    check_metrics,
    deciding_metric,
    distillation_configs,
    with_further,
    with_metric,
)
from compression_plugins.trainer.evaluation import (
    Criterion,
    Metrics,
    cross_entropy,
    evaluate,
    measure,
)
from compression_plugins.trainer.history import TrainingHistory
from compression_plugins.trainer.loop import Loop
from compression_plugins.trainer.recorder import Recorder, RecorderConfig


class KnowledgeDistillationTrainer:
    """Trains students with a fixed teacher, in a loop on the hooks of `prepare_compression`.

    One metric of the validation data decides which epoch is the best, when training stops
    early, and which checkpoints stay: `metric`, else the one that `checkpoint_config` names,
    else the validation `loss`, of which lower is better.

    Args:
        teacher: the trained teacher; frozen and in eval mode while a training runs.
        strategy: how to learn from it: a criterion of `DistillationConfig`, such as
            `KnowledgeDistillationLossConfig(temperature=4)`, or a list of them, whose weighted
            terms are added.
        checkpoint_config: where and how often to save, and how many of the best to keep; None
            saves nothing.
        use_early_stopping: stop when the metric no longer improves. Each call of `train` begins to
            count anew, unless it resumes.
        early_stopping_min_delta: an epoch improves only if it beats the best one by more than
            this (the first one always does).
        early_stopping_patience: epochs in a row without improvement before stopping.
        seed: seeds Python, numpy and torch at the begin of each `train`: the order of loaders
            without a generator of their own, dropout, random augmentation. Build the student
            after `torch.manual_seed` too: its initial weights exist before.
        metric: the metric that decides.
        lower_is_better: whether `metric` improves downwards.

    Raises:
        ConfigError: an argument is invalid, or `metric` contradicts `checkpoint_config`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        strategy: Any,
        checkpoint_config: CheckpointConfig | None = None,
        use_early_stopping: bool = False,
        early_stopping_min_delta: float = 0.001,
        early_stopping_patience: int = 5,
        seed: int | None = None,
        *,
        metric: str | None = None,
        lower_is_better: bool = False,
    ) -> None:
        owner = type(self).__name__
        require_type(owner, "teacher", teacher, nn.Module)
        require_type(owner, "checkpoint_config", checkpoint_config, (CheckpointConfig, type(None)))
        require_type(owner, "use_early_stopping", use_early_stopping, bool)
        require_type(owner, "metric", metric, (str, type(None)))
        if seed is not None:
            require_integer(owner, "seed", seed, minimum=0, maximum=MAX_SEED)
        self.teacher = teacher
        self.metric, self.lower_is_better = deciding_metric(
            metric, lower_is_better, checkpoint_config
        )
        self._seed = seed
        self._distillation = distillation_configs(teacher, strategy)
        self._checkpoints = with_metric(checkpoint_config, self.metric, self.lower_is_better)
        # Built even if unused, so that its options are checked now.
        early_stopping = EarlyStoppingConfig(
            metric=self.metric,
            min_delta=early_stopping_min_delta,
            patience=early_stopping_patience,
            lower_is_better=self.lower_is_better,
        )
        self._early_stopping = early_stopping if use_early_stopping else None
        self._manager: CompressionManager | None = None

    @property
    def manager(self) -> CompressionManager:
        """The manager of the last training, for `convert`, `report` and `export`.

        It stays open after a training that quantizes, until the next `train` or `close`.

        Raises:
            LifecycleError: none is open.
        """
        if self._manager is None:
            raise LifecycleError(
                "the trainer has no open manager: it keeps the one of its last training only if "
                "that quantizes, for example with train(..., configs=[QATConfig()]), until close()."
            )
        return self._manager

    def train(
        self,
        student: nn.Module,
        train_loader: Iterable[Any],
        validation_loader: Iterable[Any],
        epochs: int,
        optimizer: Optimizer,
        *,
        criterion: Criterion | None = None,
        metrics: Metrics | None = None,
        configs: Sequence[PluginSpec] = (),
        scheduler: Any = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        device: str | torch.device | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> TrainingHistory:
        """Train `student` in place, give it the weights of its best epoch, and return the history.

        The best epoch is the one with the best value of the deciding metric; of equal ones the
        first. The student is left in eval mode. If nothing quantizes it is a plain model again;
        else call `trainer.manager.convert()`, and `close` to get the float model back.

        Args:
            student: the model to train.
            train_loader: gives batches `(inputs, targets)`, `(inputs, targets, sample_ids)`, or
                mappings with `labels` (and perhaps `sample_ids`). The student is called with the
                inputs: a tensor; a tuple or list by position; a mapping by keyword, without labels.
            validation_loader: the same, for the metrics; its data must not be the test data.
            epochs: total number of epochs; a resumed training does what is left of them.
            optimizer: holds every parameter of the student that has requires_grad.
            criterion: task loss `criterion(output, targets)`, a scalar tensor; default:
                cross-entropy of logits (*, classes) and integer targets (*), mean over targets.
            metrics: `metrics(student, validation_loader)`, a mapping of names to numbers, called
                in eval mode without gradient, with batches on whatever device the loader gives
                them; default: `loss`, the criterion's mean over all validation samples, and for
                integer targets `accuracy`.
            configs: further plugins, such as `QATConfig()` or `TensorBoardConfig(directory)`.
            scheduler: learning-rate scheduler of the optimizer.
            scheduler_interval: moves it after each `epoch` (with the metric, if it is
                ReduceLROnPlateau) or after each `step`.
            device: moves the student there first; default: where it is. Batches follow it.
            resume: continue from the newest checkpoint, if there is one. The student, optimizer
                and loaders are built as they were for the interrupted training.
            progress: show a progress bar per epoch, or one line where there is no terminal.

        Raises:
            ConfigError: an argument is invalid, or the deciding metric is not recorded; before
                the first step.
            CheckpointError: the folder holds checkpoints and `resume` is false; or they belong to
                another training.
        """
        self.close()
        require_integer("train", "epochs", epochs, minimum=1)
        require_type("train", "student", student, nn.Module)
        require_type("train", "resume", resume, bool)
        check_loader(train_loader, "train_loader")
        check_loader(validation_loader, "validation_loader")
        check_optimizer(optimizer, student)
        check_scheduler(scheduler, scheduler_interval, optimizer, epochs, self.lower_is_better)
        if metrics is None:
            check_default_metric(self.metric, self.lower_is_better)
        self._check_resume(resume)
        recorder = Recorder(RecorderConfig(self.metric, self.lower_is_better))
        own = (self._checkpoints, self._early_stopping, recorder)
        plugins = [*self._distillation, *with_further(configs, own, progress=progress)]

        if device is not None:
            student.to(device)
        place = device_of(student)
        with undisturbed(validation_loader):
            example = first_batch(validation_loader, source="validation_loader", device=place)
        task_loss = cross_entropy if criterion is None else criterion

        def evaluation() -> dict[str, float]:
            # In the same order each time, also after resuming: sums depend on it in the last bits.
            with undisturbed(validation_loader):
                if metrics is not None:
                    return evaluate(student, lambda: metrics(student, validation_loader))
                return evaluate(
                    student, lambda: measure(student, validation_loader, task_loss, place)
                )

        with ExitStack() as until_closed:
            manager = prepare_compression(
                student, plugins, example_inputs=example.inputs, seed=self._seed
            )
            until_closed.enter_context(manager)
            recorder.initial_metrics = evaluation()
            check_metrics(plugins, recorder.initial_metrics)
            optimizer.zero_grad()
            manager.track(optimizer=optimizer, scheduler=scheduler, dataloader=train_loader)
            if self._checkpoints is not None and resume:
                manager.resume(self._checkpoints.directory, missing_ok=True)
            Loop(
                manager=manager,
                loader=train_loader,
                criterion=task_loss,
                optimizer=optimizer,
                scheduler=scheduler,
                scheduler_interval=scheduler_interval,
                device=place,
                evaluation=evaluation,
                metric=self.metric,
            ).run(epochs)
            history = recorder.history(manager.stop_reason)
            if any(isinstance(module, QuantizedLayer) for module in student.modules()):
                self._manager = manager
                until_closed.pop_all()
        student.eval()
        return history

    def get_teacher_predictions(self, inputs: Any) -> Tensor:
        """Return the teacher's logits (*, classes) for one batch of inputs.

        In eval mode and without gradient; the teacher's modes and the random state stay as they
        are. The teacher moves to the inputs' device.

        Args:
            inputs: what the teacher is called with: a tensor, a tuple or a mapping.

        Raises:
            ConfigError: the teacher's output holds no logits.
        """
        with quiet_evaluation(self.teacher):
            output = Teacher(self.teacher).run(inputs)
        return find_logits(
            output, None, where="teacher", owner="DistillationConfig", option="teacher_output"
        )

    def close(self) -> None:
        """Close the manager of the last training: its student is the float model again."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Internals -------------------------------------------------------------------------------

    def _check_resume(self, resume: bool) -> None:
        if self._checkpoints is not None:
            check_folder(self._checkpoints.directory, resume=resume)
        elif resume:
            raise ConfigError(
                "train(resume=True) needs checkpoints: pass "
                "KnowledgeDistillationTrainer(checkpoint_config=CheckpointConfig(directory))."
            )
