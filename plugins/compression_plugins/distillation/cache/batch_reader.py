"""From a loader's batch to sample ids and the teacher's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from compression_manager.errors import ConfigError
from compression_manager.models.calling import call_model, without_labels
from compression_manager.tracking.batches import to_device_of
from compression_plugins.distillation.cache.dataset import SAMPLE_IDS
from compression_plugins.distillation.cache.encoding import OWNER
from compression_plugins.distillation.cache.lookup import as_sample_ids
from compression_plugins.distillation.outputs import find_logits


class BatchReader:
    """Takes batches apart and calls the teacher; arguments as of `TeacherCache.build`."""

    def __init__(
        self,
        teacher: nn.Module,
        inputs_of: Callable[[Any], Any] | None,
        ids_of: Callable[[Any], Any] | None,
        forward: Callable[[nn.Module, Any], Any] | None,
        output: str | int | None,
    ) -> None:
        self._teacher, self._forward, self._output = teacher, forward, output
        self._inputs_of, self._ids_of = inputs_of, ids_of

    def ids(self, batch: Any) -> list[int]:
        """Return the sample ids of a batch.

        Raises:
            ConfigError: the batch has another form than `(inputs, targets, sample_ids)` or a
                mapping with "sample_ids", and no functions were given.
        """
        if self._ids_of is not None:
            ids = self._ids_of(batch)
        elif not isinstance(batch, Mapping):
            _check_triple(batch)
            ids = batch[2]
        elif SAMPLE_IDS in batch:
            ids = batch[SAMPLE_IDS]
        else:
            raise ConfigError(
                f"{OWNER}.build needs a key {SAMPLE_IDS!r} in each batch, got "
                f"{', '.join(map(str, batch))}; wrap the data set in IndexedDataset, or pass "
                "ids_of."
            )
        values: list[int] = as_sample_ids(ids, where="build").tolist()
        return values

    def logits(self, batch: Any) -> Tensor:
        """Return the teacher's logits for a batch; errors as of `ids`, or nothing fits."""
        inputs = to_device_of(self._teacher, self._inputs(batch))
        if self._forward is None:
            output = call_model(self._teacher, without_labels(inputs))
        else:
            output = self._forward(self._teacher, inputs)
        owner, option = f"{OWNER}.build", "teacher_output"
        return find_logits(output, self._output, where="teacher", owner=owner, option=option)

    def _inputs(self, batch: Any) -> Any:
        if self._inputs_of is not None:
            return self._inputs_of(batch)
        if isinstance(batch, Mapping):
            return {name: value for name, value in batch.items() if name != SAMPLE_IDS}
        _check_triple(batch)
        return batch[0]


def _check_triple(batch: Any) -> None:
    sequence = isinstance(batch, (tuple, list))
    if not sequence or len(batch) != 3:
        parts = f" of {len(batch)} parts" if sequence else ""
        raise ConfigError(
            f"{OWNER}.build takes batches (inputs, targets, sample_ids), got a "
            f"{type(batch).__name__}{parts}; wrap the data set in IndexedDataset, and for another "
            "form pass inputs_of and ids_of, functions of the batch."
        )
