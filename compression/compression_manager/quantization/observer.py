"""The contract between calibration plugins and fake quantizers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.quantizers.precision import Float32Buffers


class Observer(Float32Buffers, ABC):
    """Watches tensors and answers with the range to quantize.

    All state is held in buffers that have their final shape from construction on and are
    updated in place, so that checkpoints, DDP and torch.compile see them. float32 buffers
    keep their dtype when the model is cast.

    Attributes:
        synchronize: whether a batch is made of the tensors that all ranks of torch.distributed
            observe, which all have to do then. False until a plugin sets it; an observer that
            takes no notice follows each rank's own data.
    """

    synchronize: bool = False

    @abstractmethod
    def observe(self, input: Tensor) -> None:
        """Take `input` (any shape, floating point) into account.

        Values that are not finite must not change the range. Called in training steps, so
        that it must not read values back from an accelerator.
        """

    def observe_ends(self, low: float, high: float) -> tuple[float, float] | None:
        """Take a tensor on the CPU into account of which the two ends are known.

        A shortcut for observers that ask a tensor for nothing else, with one range for all of it.

        Args:
            low: the smallest value, finite.
            high: the largest value, finite.

        Returns:
            What `observed_range` answers from now on. None, which is the default, if nothing was
            done, so that `observe` has to be called.
        """
        return None

    @abstractmethod
    def compute_range(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return (minimum, maximum) of `input` alone, without changing any state.

        Weights are quantized with this, because their range is a function of their present
        values. Shapes: () per tensor, (channels,) per channel; float32.
        """

    @abstractmethod
    def observed_range(self) -> tuple[Tensor, Tensor]:
        """Return (minimum, maximum) of all that was observed; shapes as `compute_range`.

        Zeros as long as nothing was observed.
        """

    @abstractmethod
    def has_observed(self) -> bool:
        """Return whether any finite tensor was observed (synchronises with the device)."""

    def merge(self, other: Observer) -> None:
        """Take into account what `other` observed, for example on another rank.

        Afterwards this observer stands as if it had seen everything itself; implementations state
        where they deviate. `other` is not changed.

        Raises:
            QuantizationError: `other` does not match; or this class cannot be merged, which is
                the default.
        """
        raise QuantizationError(
            f"observers of class {type(self).__name__} cannot be merged; the class has to "
            "implement Observer.merge."
        )
