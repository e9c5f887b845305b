"""The modules that quantize one tensor of one layer while the model trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic import scalars
from compression_manager.quantization.arithmetic.parameters import (
    QuantizationParameters,
    check_range,
    compute_qparams,
    zero_point_dtype,
)
from compression_manager.quantization.arithmetic.rounding import fake_quantize
from compression_manager.quantization.autograd import runs_backward
from compression_manager.quantization.observer import Observer
from compression_manager.quantization.quantizers.phase import Phase, PhaseBuffers
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite


class FakeQuantizer(PhaseBuffers, ABC):
    """What answers the service `make_fake_quantizer`: the quantizer of one site.

    A state_dict without any key of this module (of the float model) leaves it as it is. Subclasses
    keep their phase in the bool buffers `quantizing` and, if they observe, `observing`, or override
    `phase`.

    Attributes:
        scheme: how the tensor is quantized.
        site: which tensor of which layer it is.
        called_in_eval_mode: whether it met an input in eval mode that it had no range for.
        paused: whether the model is being evaluated, so that nothing is observed in train mode
            either.
    """

    called_in_eval_mode = False
    paused = False

    def __init__(self, scheme: QuantizationScheme, site: QuantizationSite) -> None:
        super().__init__()
        self.scheme = scheme
        self.site = site

    @abstractmethod
    def set_phase(self, *, observing: bool, quantizing: bool) -> None:
        """Switch observing and quantizing on or off."""

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """Return `input` quantized (same shape and dtype), or `input` itself when off."""

    @abstractmethod
    def is_calibrated(self) -> bool:
        """Return whether there is a range to quantize with."""

    @abstractmethod
    def quantization_parameters(self, input: Tensor | None = None) -> QuantizationParameters:
        """Return the numbers with which `forward` quantizes now.

        Args:
            input: the weight, for a weight's site; an activation's site ignores it.

        Raises:
            QuantizationError: there is no range yet, or it is not finite.
        """

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            # torch hands a private copy in and the children read the same one afterwards.
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ObservedFakeQuantizer(FakeQuantizer):
    """Quantizes with the range that an observer answers.

    An activation's range follows the observer in training steps while `observing` is on and is
    kept in the buffers `scale` (float32) and `zero_point` (int32, int64 above 24 bits), both in
    the shape of the scheme's scales. A weight's range is computed from the weight itself in every
    forward pass and stored nowhere. Evaluation changes no buffer.

    The buffers `observing` and `quantizing` (bool) hold the phase, so that checkpoints do.
    Branches use Python copies of them: forward never waits for an accelerator, and
    torch.compile compiles anew only when the phase changes.

    Raises:
        QuantizationError: the scheme is per channel and the site has no number of channels.
    """

    observing: Tensor
    quantizing: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, scheme: QuantizationScheme, site: QuantizationSite, observer: Observer
    ) -> None:
        super().__init__(scheme, site)
        shape = site.range_shape(scheme)
        self.observer = observer
        self.register_buffer("observing", torch.zeros((), dtype=torch.bool, device=site.device))
        self.register_buffer("quantizing", torch.zeros((), dtype=torch.bool, device=site.device))
        self._is_weight = site.role == "weight"
        self._calibrated = self._is_weight
        if not self._is_weight:
            scale = torch.ones(shape, dtype=torch.float32, device=site.device)
            self.register_buffer("scale", scale)
            self.register_buffer(
                "zero_point", torch.zeros(shape, dtype=zero_point_dtype(scheme), device=site.device)
            )

    def set_phase(self, *, observing: bool, quantizing: bool) -> None:
        """Switch observing and quantizing on or off."""
        begins = quantizing and not self.phase.quantizing
        self._write_phase(Phase(observing, quantizing))
        # Asked here, between steps, so that a compiled forward finds the answer cached.
        if self.is_calibrated() and begins and not self._is_weight:
            self._follow_observer()

    def is_calibrated(self) -> bool:
        """Return whether there is a range to quantize with; always, for a weight.

        Synchronises with the device until the answer is yes.
        """
        if not self._calibrated:
            self._calibrated = self.observer.has_observed()
        return self._calibrated

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` quantized, or `input` itself when off or before any finite batch."""
        phase = self.phase
        if self._is_weight:
            if not phase.quantizing:
                return input
            scale, zero_point = self._weight_qparams(input)
        else:
            self.follow(input)
            if not phase.quantizing or not self.is_calibrated():
                return input
            scale, zero_point = self.scale, self.zero_point
        scheme = self.scheme
        return fake_quantize(
            input,
            scale,
            zero_point,
            scheme.quant_min,
            scheme.quant_max,
            scheme.axis,
            group_size=scheme.group_size,
        )

    def follow(self, input: Tensor) -> None:
        """Let the range of an activation follow `input`, in a training step while observing.

        Activation checkpointing runs a forward pass again during the backward pass, with what
        was observed already.
        """
        if self._follows():
            self.observer.observe(input.detach())
            # Some observers search long for their range; until it is used, nobody asks.
            if self._phase.quantizing:
                self._follow_observer()

    def follow_ends(self, input: Tensor, low: float, high: float) -> tuple[float, int]:
        """Do what `follow` does of an activation on the CPU of which the two ends are known.

        Args:
            input: the activation.
            low: its smallest value, finite.
            high: its largest value, finite.

        Returns:
            scale and zero point of the whole tensor, for quantizers that quantize already.
        """
        if self._follows():
            limits = self.observer.observe_ends(low, high)
            if limits is None:
                self.follow(input)
            elif scalars.serve(self.scheme) and scalars.fit(*limits):
                return self._take_numbers(*limits)
            else:
                self._follow_observer()
        return float(self._buffer("scale")), int(self._buffer("zero_point"))

    def _follows(self) -> bool:
        if not self._phase.observing or runs_backward():
            return False
        if not self.training and not self._calibrated and not torch.compiler.is_compiling():
            self.called_in_eval_mode = True
        return self.training and not self.paused

    def quantization_parameters(self, input: Tensor | None = None) -> QuantizationParameters:
        """Return the numbers with which `forward` quantizes now, as tensors of their own.

        Args:
            input: the weight, for a weight's site; an activation's site ignores it.

        Raises:
            QuantizationError: nothing was observed yet, or the weight is missing or not finite.
        """
        if self._is_weight:
            if input is None:
                raise QuantizationError(f"{self.site}: its range needs the weight itself.")
            minimum, maximum = self.observer.compute_range(input.detach())
            check_range(minimum, maximum, where=f"{self.site}: the range")
            scale, zero_point = compute_qparams(minimum, maximum, self.scheme)
        else:
            if not self.is_calibrated():
                raise QuantizationError(
                    f"{self.site}: no finite value was observed, so that there is no range to "
                    "quantize with; run at least one training step with this layer in use."
                )
            if not self.phase.quantizing:
                self._follow_observer()
            scale, zero_point = self.scale.clone(), self.zero_point.clone()
        scheme = self.scheme
        return QuantizationParameters(
            scale,
            zero_point,
            scheme.quant_min,
            scheme.quant_max,
            scheme.axis,
            scheme.group_size,
        )

    def extra_repr(self) -> str:
        """Return the scheme and the role, for `print(model)`."""
        return f"{self.scheme}, {self.site.role}"

    def _read_phase(self) -> None:
        super()._read_phase()
        self._calibrated = self._is_weight
        self.is_calibrated()

    def _weight_qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return compute_qparams(*self.observer.compute_range(weight.detach()), self.scheme)

    def _follow_observer(self) -> None:
        """Bring an activation's scale and zero point up to date with what was observed."""
        minimum, maximum = self.observer.observed_range()
        limits = scalars.read(minimum, maximum) if scalars.serve(self.scheme) else None
        if limits is not None:
            self._take_numbers(*limits)
            return
        scale, zero_point = compute_qparams(minimum, maximum, self.scheme)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def _take_numbers(self, minimum: float, maximum: float) -> tuple[float, int]:
        scale, zero_point = scalars.affine_qparams(minimum, maximum, self.scheme)
        self._buffer("scale").fill_(scale)
        self._buffer("zero_point").fill_(zero_point)
        return scale, zero_point
