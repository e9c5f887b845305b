"""Running a model over calibration data, with a progress bar on stderr."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from compression_manager.errors import CompressionError, ConfigError
from compression_manager.models.calling import call_model
from compression_manager.progress_bar import ProgressBar
from compression_manager.tracking.batches import inputs_of, number_of_batches, to_device_of
from compression_plugins.fake_quant.post_training_config import PTQConfig

Item = TypeVar("Item")


@dataclass(frozen=True)
class CalibrationData:
    """Batches, and how a model is run on one of them.

    A tensor is passed to the model as it is, a mapping by keyword without its labels, and of
    `(inputs, targets)` or `(inputs,)` the inputs; inputs that are a tuple go by position. They
    are moved to the model's device first.

    Attributes:
        batches: an iterable; one that can be walked only once is enough unless it is walked twice.
        limit: how many batches are taken; None takes all.
        forward: `forward(model, batch)` for batches of another form, on the device they are on.
    """

    batches: Iterable[Any]
    limit: int | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None

    @classmethod
    def of(cls, config: PTQConfig) -> CalibrationData:
        """Return the data of a config that needs some."""
        assert config.calibration_data is not None  # the config refuses to lack it
        return cls(config.calibration_data, config.calibration_batches, config.calibration_forward)

    def held(self) -> CalibrationData:
        """Return the same batches in memory: a loader may shuffle or augment each time anew."""
        return replace(self, batches=list(self._taken()), limit=None)

    def run(self, model: nn.Module, bar: str | None = None) -> None:
        """Call `model` with every batch.

        Args:
            model: in the mode and phase that the caller chose.
            bar: title of a progress bar; None shows none.

        Raises:
            ConfigError: there is no batch, or the model cannot be called with one.
        """
        count = 0
        taken = self._taken()
        shown: AbstractContextManager[Iterable[Any]] = nullcontext(taken)
        if bar is not None:
            total = number_of_batches(self.batches, self.limit)
            shown = progress(taken, bar, total, "batch")
        with shown as batches:
            for batch in batches:
                self._call(model, batch, count)
                count += 1
            if count == 0:
                raise ConfigError("calibration_data holds no batch; pass an iterable of batches.")

    def _taken(self) -> Iterator[Any]:
        return itertools.islice(self.batches, self.limit)

    def _call(self, model: nn.Module, batch: Any, index: int) -> None:
        try:
            if self.forward is not None:
                self.forward(model, batch)
            else:
                inputs = inputs_of(
                    batch,
                    source="calibration_data",
                    otherwise="calibration_forward=lambda model, batch: ...",
                )
                call_model(model, to_device_of(model, inputs))
        except CompressionError:
            raise
        except Exception as error:
            how = "" if self.forward is None else " through calibration_forward"
            raise ConfigError(
                f"the model cannot be called with batch {index} of calibration_data{how} "
                f"({error!r}). A batch is a tensor, a mapping, or (inputs, targets) with a tuple "
                "of inputs for several; for another form pass calibration_forward=lambda model, "
                "batch: ..."
            ) from error


@contextmanager
def progress(
    items: Iterable[Item], title: str, total: int | None, unit: str
) -> Iterator[Iterable[Item]]:
    """Show a bar while the items yielded are walked; without a terminal, one line at the end."""
    bar = ProgressBar(
        items,
        desc=title,
        total=total,
        disable=None,
        file=sys.stderr,
        dynamic_ncols=True,
        unit=unit,
    )
    has_terminal = not bar.disable  # closing disables a bar, too
    with bar:
        yield bar
    if not has_terminal:
        print(f"{title}: done", file=sys.stderr, flush=True)
