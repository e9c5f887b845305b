"""What a fake quantizer does at present, in buffers that checkpoints hold and in a Python copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from compression_manager.quantization.autograd import transforms_run
from compression_manager.quantization.quantizers.precision import Float32Buffers
from compression_manager.quantization.tensors.changes import version_of

# No tensor has this version.
_UNKNOWN = -1


class Phase(NamedTuple):
    """What a fake quantizer does in training.

    Attributes:
        observing: ranges follow what passes through.
        quantizing: the output is quantized; otherwise it is the input itself.
    """

    observing: bool
    quantizing: bool


class PhaseBuffers(Float32Buffers):
    """A module with a phase; subclasses register the buffers, of which they may lack the first.

    Attributes:
        observing: bool ().
        quantizing: bool ().
    """

    quantizing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._phase = Phase(observing=False, quantizing=False)
        # The version of the buffers that `_phase` is a copy of.
        self._phase_version = _UNKNOWN
        self.register_load_state_dict_post_hook(_tell)  # type: ignore[no-untyped-call]  # untyped in torch

    @property
    def phase(self) -> Phase:
        """What is switched on; both off at construction.

        A Python copy of the buffers, for which branches need not wait for an accelerator. It is
        read anew where somebody else wrote to them, such as a moving average of the model.
        """
        buffer = self._buffer("quantizing")
        if (
            not torch.compiler.is_compiling()
            and version_of(buffer) != self._phase_version
            # Transforms and tracers put tensors without values in their place.
            and type(buffer) is Tensor
            and not transforms_run()
        ):
            self._read_phase()
        return self._phase

    def _write_phase(self, phase: Phase) -> None:
        """Keep `phase` in the buffers and in the copy."""
        for name, value in phase._asdict().items():
            if name in self._buffers:
                self._buffer(name).fill_(value)
        self._phase, self._phase_version = phase, version_of(self._buffer("quantizing"))

    def _read_phase(self) -> None:
        """Take the phase from the buffers; subclasses add what else they hold copies of."""
        observing = bool(self._buffers.get("observing", self._phase.observing))
        self._phase = Phase(observing, bool(self._buffer("quantizing")))
        self._phase_version = version_of(self._buffer("quantizing"))

    def _after_load(self) -> None:
        """Take over what `load_state_dict` has put into the buffers."""
        self._read_phase()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch
        # The buffers of a copy, as those of a moved module, count their changes from the beginning.
        self._phase_version = _UNKNOWN

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._phase_version = _UNKNOWN
        return self


def _tell(module: nn.Module, incompatible_keys: object) -> None:
    # A function, because a copy of the module would keep a method of the first one.
    if isinstance(module, PhaseBuffers) and "quantizing" in module._buffers:
        module._after_load()
