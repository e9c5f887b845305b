"""The fake quantizer whose scale, and zero point, are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    FakeQuantizer,
    Observer,
    Phase,
    QuantizationParameters,
    QuantizationScheme,
    QuantizationSite,
)
from compression_manager.quantization.arithmetic.parameters import check_range
from compression_manager.quantization.autograd import apply, runs_backward
from compression_manager.quantization.exporting import is_exporting
from compression_manager.quantization.scheme import MAX_FLOAT32_BITS
from compression_manager.ranks import has_other_ranks, is_distributed
from compression_plugins.learned_scale.arithmetic import (
    IntegerZeroPoint,
    PositiveScale,
    ZeroGradient,
    learned_fake_quantize,
    refuse_transforms,
)
from compression_plugins.learned_scale.start import (
    mean_magnitude,
    mean_magnitude_of_ranks,
    start_values,
)


class LearnedScaleQuantizer(FakeQuantizer):
    """Quantizes with a scale, and for affine schemes a zero point, that training changes.

    Until quantizing starts, an activation's observer follows what passes through. The scale then
    starts at 2 * mean|v| / sqrt(Q) (LSQ, section 2.1; Q is the largest number of steps from zero
    to an end of the range), or at that of the observed range where it is smaller: with 8 bits
    LSQ's value would leave most integers unused. The zero point starts at the observed range's.
    From then on observers are not asked again. Where the phase ends observing, an activation's
    parameters are frozen.

    Where torch.distributed is initialized, parameters that have no part in the output get a
    gradient of zero and keep `requires_grad`, because DistributedDataParallel settles at its
    construction which parameters it waits for; `drop_idle_gradients` takes it away before an
    optimizer's momentum sees it. What an activation's parameters start from is what all ranks
    observed, if its observer synchronizes.

    Parameters: `log_scale`, and for affine schemes `zero_fraction`, float32 in the shape of the
    scheme's scales. Buffers: `observing`, `quantizing`, `started` (bool); an activation's
    `magnitude` (float32) and `batches` (int64): mean of |v| over the batches observed.

    Args:
        scheme: at most 24 bits, not dynamic.
        site: which tensor of which layer it is.
        observer: answers the first range.
        gradient_scaling: multiply gradients by LSQ's g = 1 / sqrt(N * Q), with the number N of
            weights that share the scale, or of one sample's values, and the steps Q from zero to
            the largest integer (affine: from the smallest to the largest).
        minimum_scale: the scale never falls below it.

    Raises:
        QuantizationError: a scheme of more than 24 bits.
    """

    log_scale: nn.Parameter
    zero_fraction: nn.Parameter | None
    observing: Tensor
    quantizing: Tensor
    started: Tensor
    magnitude: Tensor
    batches: Tensor

    def __init__(
        self,
        scheme: QuantizationScheme,
        site: QuantizationSite,
        observer: Observer,
        *,
        gradient_scaling: bool,
        minimum_scale: float,
    ) -> None:
        super().__init__(scheme, site)
        if scheme.bits > MAX_FLOAT32_BITS:
            raise QuantizationError(
                f"{site}: a learned scale takes at most {MAX_FLOAT32_BITS} bits, got {scheme}."
            )
        device = site.device
        zeros = torch.zeros(site.range_shape(scheme), dtype=torch.float32, device=device)
        self.observer = observer
        self.gradient_scaling = gradient_scaling
        self.minimum_scale = minimum_scale
        self.log_scale = nn.Parameter(zeros.clone())
        self.register_parameter(
            "zero_fraction",
            None if scheme.symmetric else nn.Parameter(zeros.clone()),
        )
        for name in ("observing", "quantizing", "started"):
            self.register_buffer(name, torch.zeros((), dtype=torch.bool, device=device))
        self._is_weight = site.role == "weight"
        if not self._is_weight:
            self.register_buffer("magnitude", zeros.clone())
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=device))
        self._started = False
        self._calibrated = self._is_weight

    def set_phase(self, *, observing: bool, quantizing: bool) -> None:
        """Switch observing and quantizing on or off."""
        self._write_phase(Phase(observing, quantizing))
        self.is_calibrated()
        self._freeze_or_train()

    def is_calibrated(self) -> bool:
        """Return whether there is a range to quantize with; always, for a weight.

        Synchronises with the device until the answer is yes.
        """
        if not self._calibrated:
            self._calibrated = self.observer.has_observed()
        return self._calibrated

    @property
    def has_started(self) -> bool:
        """Whether scale and zero point are set, so that training changes them."""
        return self._started

    def start(self, weight: Tensor | None = None) -> None:
        """Set the parameters from `weight`, or from what was observed; the first call alone does.

        Nothing happens as long as nothing was observed, or the weight is not finite.
        """
        if self._started or not self.is_calibrated():
            return
        log_scale, zero_fraction = self._first_values(weight)
        if not bool(log_scale.isfinite().all()):
            return
        with torch.no_grad():
            self.log_scale.copy_(log_scale)
            if self.zero_fraction is not None and zero_fraction is not None:
                self.zero_fraction.copy_(zero_fraction)
        self.started.fill_(True)
        self._started = True
        self._freeze_or_train()

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` quantized, or `input` itself when off or before any finite batch.

        Raises:
            QuantizationError: a transform of torch.func, or forward mode, is active.
        """
        phase = self.phase
        follows = self.training and phase.observing and not (self.paused or runs_backward())
        if follows and not (self._started or self._is_weight):
            self._observe(input.detach())
        if not phase.quantizing or not self.is_calibrated():
            return self._with_parameters(input)
        refuse_transforms()
        # Starting reads values back, which a compiled forward cannot.
        if self.training and not self._started and not torch.compiler.is_compiling():
            self.start(input.detach())
        scale, zero_point = self._scale_and_zero_point(input)
        output = learned_fake_quantize(
            input, scale, zero_point, self.scheme, gradient_factor=self._gradient_factor(input)
        )
        return self._with_parameters(output)

    def drop_idle_gradients(self) -> None:
        """Remove the gradients of parameters that have no part in the output, if there are any."""
        if self._is_idle:
            for parameter in self.parameters(recurse=False):
                parameter.grad = None

    def quantization_parameters(self, input: Tensor | None = None) -> QuantizationParameters:
        """Return the numbers with which `forward` quantizes now, as tensors of their own.

        Args:
            input: the weight, for a weight's site; an activation's site ignores it.

        Raises:
            QuantizationError: nothing was observed yet, the weight is missing or not finite, or
                training made the scale so.
        """
        if self._is_weight and input is None:
            raise QuantizationError(f"{self.site}: its range needs the weight itself.")
        if not self.is_calibrated():
            raise QuantizationError(
                f"{self.site}: no finite value was observed, so that there is no range to "
                "quantize with; run at least one training step with this layer in use."
            )
        with torch.no_grad():
            if input is not None and self._is_weight:
                check_range(*self.observer.compute_range(input), where=f"{self.site}: the range")
            scale, zero_point = self._scale_and_zero_point(input)
            check_range(torch.zeros_like(scale), scale, where=f"{self.site}: the learned scale")
        scheme = self.scheme
        return QuantizationParameters(
            scale.clone(),
            zero_point.to(torch.int32),
            scheme.quant_min,
            scheme.quant_max,
            scheme.axis,
            scheme.group_size,
        )

    def extra_repr(self) -> str:
        """Return the scheme and the role, for `print(model)`."""
        return f"{self.scheme}, {self.site.role}, learned scale"

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return name -> Parameter, the name beginning with the layer's."""
        prefix = f"{self.site.layer}." if self.site.layer else ""
        kind = "weight" if self._is_weight else "input"
        return {
            f"{prefix}{kind}_quantizer.{name}": parameter
            for name, parameter in self.named_parameters(recurse=False)
        }

    # Internals -------------------------------------------------------------------------------

    def _scale_and_zero_point(self, input: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return scale and zero point (float32, integer values), with gradient."""
        log_scale: Tensor = self.log_scale
        zero_fraction: Tensor | None = self.zero_fraction
        if not self._started:
            log_scale, zero_fraction = self._first_values(input)
        elif self._is_frozen:
            log_scale = log_scale.detach()
            zero_fraction = None if zero_fraction is None else zero_fraction.detach()
        scale = apply(PositiveScale, log_scale, self.minimum_scale)
        scheme = self.scheme
        if zero_fraction is None:
            return scale, torch.full_like(scale, scheme.symmetric_zero_point)
        zero_point = apply(IntegerZeroPoint, zero_fraction, scheme.quant_min, scheme.quant_max)
        return scale, zero_point

    @torch.no_grad()
    def _first_values(self, input: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what `log_scale` and `zero_fraction` start at."""
        scheme = self.scheme
        if self._is_weight and input is not None:
            low, high = self.observer.compute_range(input)
            magnitude = mean_magnitude(input, scheme)
        else:
            low, high = self.observer.observed_range()
            magnitude = self.magnitude
        return start_values(low, high, magnitude, scheme, self.minimum_scale)

    def _observe(self, input: Tensor) -> None:
        self.observer.observe(input)
        if self.observer.synchronize and has_other_ranks():
            magnitude = mean_magnitude_of_ranks(input, self.scheme, self.magnitude.shape)
        elif input.numel() == 0:
            return
        else:
            magnitude = mean_magnitude(input, self.scheme)
        finite = magnitude.isfinite().all()
        # The mean of the means of all finite batches; no value is read back.
        self.batches.add_(finite)
        change = (magnitude - self.magnitude) / self.batches.clamp(min=1)
        self.magnitude.add_(torch.where(finite, change, 0.0))

    def _with_parameters(self, output: Tensor) -> Tensor:
        """Return `output`, from which parameters without part in it get a gradient of zero."""
        wanted = self._is_idle and torch.is_grad_enabled() and is_distributed()
        if not wanted or is_exporting():
            return output
        return apply(ZeroGradient, output, self.log_scale, self.zero_fraction)

    def _gradient_factor(self, input: Tensor) -> float:
        if not self.gradient_scaling or is_exporting():
            return 1.0  # nothing is trained there, and sqrt would fix the size of a batch
        scheme = self.scheme
        if self._is_weight:
            count = input.numel() / max(self.log_scale.numel(), 1)
        else:
            # The loss is a mean over samples, so that their number must not enter twice.
            count = input.numel() / max(input.shape[0], 1) if input.dim() > 1 else input.numel()
        lowest = scheme.symmetric_zero_point if scheme.symmetric else scheme.quant_min
        return 1.0 / math.sqrt(max(count, 1.0) * (scheme.quant_max - lowest))

    def _freeze_or_train(self) -> None:
        frozen = self._is_frozen
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(not frozen or is_distributed())
            if frozen:
                # Momentum moves whatever has a gradient, even one of zero.
                parameter.grad = None

    @property
    def _is_frozen(self) -> bool:
        observing, quantizing = self._phase
        return self._started and quantizing and not observing and not self._is_weight

    @property
    def _is_idle(self) -> bool:
        """Whether the parameters have no part in the output, or none that is trained."""
        return not (self._started and self._phase.quantizing) or self._is_frozen

    def _read_phase(self) -> None:
        super()._read_phase()
        self._started = bool(self.started)
        self._calibrated = self._is_weight
        self.is_calibrated()

    def _after_load(self) -> None:
        super()._after_load()
        self._freeze_or_train()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: value.data for name, value in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dtype != torch.float32:
                parameter.data = before[name].to(parameter.device)
        return self
