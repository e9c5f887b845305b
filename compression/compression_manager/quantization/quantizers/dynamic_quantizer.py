"""Quantizing an input with the range that it has itself, in training and after conversion."""

from __future__ import annotations

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.arithmetic.overridable import overridable
from compression_manager.quantization.arithmetic.parameters import (
    QuantizationParameters,
    compute_qparams,
)
from compression_manager.quantization.arithmetic.ranges import tensor_range
from compression_manager.quantization.arithmetic.rounding import fake_quantize
from compression_manager.quantization.quantizers.phase import Phase
from compression_manager.quantization.quantizers.quantizer_module import FakeQuantizer
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite


@overridable
def fake_quantize_dynamically(input: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Return `input` quantized with its own smallest and largest value, per tensor or per token.

    Nothing is clipped, so that the gradient passes everywhere. What is not finite makes all that
    shares a scale with it not a number.
    """
    scale, zero_point = compute_qparams(*tensor_range(input, scheme), scheme)
    return fake_quantize(
        input,
        scale,
        zero_point,
        scheme.quant_min,
        scheme.quant_max,
        pass_clipped_gradient=True,
    )


class DynamicFakeQuantizer(FakeQuantizer):
    """Quantizes an input with its own range; there is nothing to observe.

    The buffer `quantizing` (bool) holds the phase, so that checkpoints do.
    """

    def __init__(self, scheme: QuantizationScheme, site: QuantizationSite) -> None:
        super().__init__(scheme, site)
        self.register_buffer("quantizing", torch.zeros((), dtype=torch.bool, device=site.device))

    def set_phase(self, *, observing: bool, quantizing: bool) -> None:
        """Switch quantizing on or off; observing means nothing here."""
        self._write_phase(Phase(observing, quantizing))

    def is_calibrated(self) -> bool:
        """Return True: every input brings its range."""
        return True

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` quantized, or `input` itself when off."""
        return fake_quantize_dynamically(input, self.scheme) if self.phase.quantizing else input

    def quantization_parameters(self, input: Tensor | None = None) -> QuantizationParameters:
        """Return the numbers with which `forward` quantizes `input`.

        Raises:
            QuantizationError: without an input there are none.
        """
        if input is None:
            raise QuantizationError(
                f"{self.site}: its range is dynamic and needs the input itself."
            )
        scale, zero_point = compute_qparams(*tensor_range(input, self.scheme), self.scheme)
        return QuantizationParameters(
            scale, zero_point, self.scheme.quant_min, self.scheme.quant_max, None
        )

    def extra_repr(self) -> str:
        """Return the scheme and the role, for `print(model)`."""
        return f"{self.scheme}, {self.site.role}"
