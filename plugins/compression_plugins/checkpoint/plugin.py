"""Saves what `context.collect_state()` gives; knows no other plugin."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compression_manager.configuration.checks import require_writable_folder
from compression_manager.context import Context
from compression_manager.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    blame_option,
    suggest,
)
from compression_manager.json_values import json_values
from compression_manager.plugin import Plugin, hookimpl
from compression_manager.run_report.record import describe_run
from compression_manager.state import (
    IndexEntry,
    find_checkpoint,
    list_checkpoints,
    remove_directory,
    write_checkpoint,
    write_index,
)
from compression_plugins.checkpoint.config import CheckpointConfig
from compression_plugins.checkpoint.ownership import Ownership
from compression_plugins.checkpoint.retention import Saved, kept, ranked

_NAME = re.compile(r"step-[0-9]{8,}")


class CheckpointPlugin(Plugin[CheckpointConfig]):
    """Saves every N epochs or optimizer steps and keeps the newest and the best.

    Each checkpoint is a directory `step-00000120` (its global step) in the configured folder,
    beside an `index.json` that lists them. Others are removed only when the new one and the
    index are safely on the disk. It saves after all other plugins have seen the event, so
    its place in the list has no meaning.
    """

    config_class = CheckpointConfig

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__(config)
        self._root = Path(config.directory)
        self._saved: list[Saved] = []
        # Removed once the newest checkpoint is on disk; a crash can come in between.
        self._obsolete: list[str] = []
        self._last_saved_step = 0
        self._metrics: dict[str, float] = {}
        self._metrics_epoch: int | None = None
        self._ownership = Ownership(self._root)

    def required_hooks(self) -> frozenset[str]:
        """Return the hook that carries the metric to watch, and the one that counts epochs."""
        config = self.config
        return frozenset(
            hook
            for hook, is_needed in (
                ("on_after_eval", config.metric is not None),
                ("on_epoch_begin", config.save_every_steps is None),
            )
            if is_needed
        )

    @hookimpl
    def validate_composition(self, plugins: Sequence[Plugin[Any]]) -> None:
        """Refuse a folder that cannot be written, or that another instance uses.

        Raises:
            ConfigError: the folder is a file, lies in one, is not writable or is shared.
        """
        with blame_option("directory"):
            require_writable_folder(self._root)
            self._check_not_shared(plugins)

    def _check_not_shared(self, plugins: Sequence[Plugin[Any]]) -> None:
        for other in plugins:
            if (
                isinstance(other, CheckpointPlugin)
                and other is not self
                and os.path.realpath(other._root) == os.path.realpath(self._root)
            ):
                raise ConfigError(
                    f"plugins '{self.name}' and '{other.name}' both save to {self._root}; "
                    "give each a directory of its own."
                )

    @hookimpl
    def on_train_begin(self, context: Context) -> None:
        """Refuse to mix this training's checkpoints with another one's.

        Warns of checkpoints that are newer than the one that was resumed.

        Raises:
            CheckpointError: another training saves there now; or the folder holds checkpoints of
                one that is not resumed.
        """
        context.add_cleanup(self._ownership.give_up, owner=self.name)
        self._ownership.take(self.name)
        try:
            self._check_folder(context)
        except BaseException:
            self._ownership.give_up()
            raise

    def _check_folder(self, context: Context) -> None:
        if any((self._root / item.name).exists() for item in self._saved):
            self._warn_of_newer(context.global_step)
            return
        found = list_checkpoints(self._root)
        if found:
            raise CheckpointError(
                f"plugin '{self.name}': {self._root} already holds checkpoints of another "
                f"training, the newest being {found[-1].directory.name}. Continue it with "
                f"manager.resume({str(self._root)!r}), or choose another directory."
            )

    def _warn_of_newer(self, step: int) -> None:
        names = sorted(filter(_NAME.fullmatch, os.listdir(self._root)))
        newer = [name for name in names if int(name.removeprefix("step-")) > step]
        if newer:
            warnings.warn(
                f"{self.name}: {self._root} holds checkpoints newer than step {step}, where "
                f"training goes on: {', '.join(newer)}. Until it has passed them, resume() of this "
                "folder continues from the newest of these. Remove them, or choose another "
                "directory.",
                stacklevel=2,
            )

    @hookimpl
    def on_train_end(self) -> None:
        """Let other trainings save to the folder: nothing is saved between two trainings."""
        self._ownership.give_up()

    @hookimpl
    def on_after_eval(self, context: Context, metrics: Mapping[str, float]) -> None:
        """Remember the metrics for this epoch's checkpoint.

        Raises:
            ConfigError: the watched metric was not recorded.
        """
        watched = self.config.metric
        if watched is not None and watched not in metrics:
            raise ConfigError(
                f"plugin '{self.name}' keeps the best by the metric {watched!r}, which "
                f"on_after_eval did not record; {suggest(watched, metrics)}"
            )
        self._metrics = {name: float(value) for name, value in metrics.items()}
        self._metrics_epoch = context.epoch

    @hookimpl(trylast=True)
    def on_step_end(self, context: Context) -> None:
        """Save after every N-th optimizer step; between two of them nothing new is there."""
        every = self.config.save_every_steps
        step = context.global_step
        if every is not None and step > self._last_saved_step and step % every == 0:
            self._save(context, metrics={})

    @hookimpl(trylast=True)
    def on_epoch_end(self, context: Context) -> None:
        """Save after every N-th epoch, with the metrics of its evaluation."""
        every = self.config.save_every_epochs
        if every is not None and (context.epoch + 1) % every == 0:
            evaluated = self._metrics_epoch == context.epoch
            self._save(context, metrics=self._metrics if evaluated else {})

    def state_dict(self) -> dict[str, Any]:
        """Return what is on disk and what decides what stays."""
        return {
            "metric": self.config.metric,
            "saved": [dataclasses.asdict(item) for item in self._saved],
            "obsolete": list(self._obsolete),
            "last_saved_step": self._last_saved_step,
            "metrics": dict(self._metrics),
            "metrics_epoch": self._metrics_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue to manage the checkpoints that were there.

        Metrics of another name than the one watched now are forgotten.

        Raises:
            CheckpointMismatchError: the state is not this plugin's.
        """
        try:
            saved = [Saved(**item) for item in state["saved"]]
            if state["metric"] != self.config.metric:
                saved = [dataclasses.replace(item, metric=None) for item in saved]
            obsolete, metrics = list(state["obsolete"]), dict(state["metrics"])
            last_saved_step, metrics_epoch = state["last_saved_step"], state["metrics_epoch"]
            for name in (*obsolete, *(item.name for item in saved)):
                _check_name(name)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointMismatchError(
                f"plugin '{self.name}' cannot read its state from the checkpoint: {error!r}."
            ) from error
        self._saved, self._obsolete = saved, obsolete
        self._metrics, self._metrics_epoch = metrics, metrics_epoch
        self._last_saved_step = last_saved_step

    def _save(self, context: Context, *, metrics: Mapping[str, float]) -> None:
        new = Saved(
            name=f"step-{context.global_step:08d}",
            epoch=context.epoch,
            global_step=context.global_step,
            metric=metrics.get(self.config.metric) if self.config.metric is not None else None,
        )
        before = self._saved, self._obsolete, self._last_saved_step
        # The checkpoint holds the books as they are once it is written.
        self._book(new)
        try:
            write_checkpoint(
                self._root / new.name,
                context.collect_state(),
                metadata={
                    "epoch": new.epoch,
                    "global_step": new.global_step,
                    "metrics": json_values(metrics),
                    "run": describe_run(context),
                },
            )
        except BaseException:
            self._saved, self._obsolete, self._last_saved_step = before
            raise
        write_index(self._root, self._index())
        self._remove_obsolete()

    def _book(self, new: Saved) -> None:
        present = [
            item
            for item in self._saved
            if item.name != new.name and (self._root / item.name).is_dir()
        ]
        stay = kept(
            [*present, new],
            keep_last=self.config.keep_last,
            keep_best_n=self.config.keep_best_n if self.config.metric is not None else 0,
            lower_is_better=self.config.lower_is_better,
        )
        names = {item.name for item in stay}
        gone = [item.name for item in present if item.name not in names]
        self._obsolete = [name for name in (*self._obsolete, *gone) if name not in names]
        self._saved = stay
        self._last_saved_step = new.global_step

    def _index(self) -> list[IndexEntry]:
        best = ranked(self._saved, lower_is_better=self.config.lower_is_better)[:1]
        return [
            IndexEntry(item.name, item.epoch, item.global_step, item.metric, item in best)
            for item in self._saved
        ]

    def _remove_obsolete(self) -> None:
        for name in self._obsolete:
            path = self._root / name
            if path.is_dir():
                try:
                    remove_directory(path)
                except OSError as error:
                    raise CheckpointError(
                        f"plugin '{self.name}' cannot remove the old checkpoint {path}: {error}"
                    ) from error
        self._obsolete = []


def _check_name(name: str) -> None:
    # A forged checkpoint must not have other folders removed.
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a checkpoint")


def best_checkpoint(directory: str | os.PathLike[str]) -> Path:
    """Return the best checkpoint in a folder that the plugin wrote.

    Raises:
        CheckpointError: none is known to be the best, or there is no such folder.
    """
    return find_checkpoint(directory, which="best")
