"""Options of the post-training quantization plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from compression_manager.configuration.checks import require_choice, require_integer, require_type
from compression_manager.errors import ConfigError, MissingObjectError
from compression_manager.plugin import PluginConfig, option
from compression_manager.quantization import QuantizationScheme
from compression_plugins.fake_quant.config import (
    DEFAULT_ACTIVATION,
    DEFAULT_WEIGHT,
    LayerRule,
    check_schemes,
)

MODES = ("static", "dynamic", "weight_only")


@dataclass(frozen=True)
class PTQConfig(PluginConfig):
    """Post-training quantization: no training, at most a look at some data.

    Raises:
        ConfigError: options that contradict one another, data that is missing, or that the mode
            has no use for.
    """

    plugin: ClassVar[str] = "ptq"

    mode: Literal["static", "dynamic", "weight_only"] = field(
        default="static",
        metadata=option(
            "Inputs of layers: 'static' quantizes them with ranges observed over calibration_data, "
            "'dynamic' with their own ranges at run time, 'weight_only' not at all."
        ),
    )
    weight: QuantizationScheme = field(
        default=DEFAULT_WEIGHT, metadata=option("Scheme of all weights.")
    )
    activation: QuantizationScheme | None = field(
        default=None,
        metadata=option(
            "Scheme of all layer inputs; null: 8 bits, affine, unsigned, per tensor (none with "
            "'weight_only')."
        ),
    )
    overrides: tuple[LayerRule, ...] = field(
        default=(), metadata=option("Exceptions per layer; the last rule that matches applies.")
    )
    calibration_data: Iterable[Any] | None = field(
        default=None,
        metadata=option(
            "Batches for 'static' and bias_correction: tensors, mappings, or (inputs, targets).",
            runtime=True,
        ),
    )
    calibration_batches: int | None = field(
        default=None, metadata=option("How many batches are taken; null: all.")
    )
    calibration_forward: Callable[[nn.Module, Any], Any] | None = field(
        default=None,
        metadata=option(
            "Runs the model on a batch of another form: calibration_forward(model, batch).",
            runtime=True,
        ),
    )
    bias_correction: bool = field(
        default=False,
        metadata=option("Take the mean error of each layer's output out of its bias."),
    )

    def __post_init__(self) -> None:
        require_choice(self, "mode", self.mode, MODES)
        check_schemes(self)
        require_type(self, "bias_correction", self.bias_correction, bool)
        self._choose_activation()
        for index, rule in enumerate(self.overrides):
            if rule.activation is not None:
                self._check_mode(f"overrides[{index}].activation", rule.activation)
        self._check_data()

    @property
    def needs_data(self) -> bool:
        """Whether anything is measured on calibration data."""
        return self.mode == "static" or self.bias_correction

    def _choose_activation(self) -> None:
        if self.activation is None:
            if self.mode != "weight_only":
                chosen = replace(DEFAULT_ACTIVATION, dynamic=self.mode == "dynamic")
                object.__setattr__(self, "activation", chosen)
            return
        if self.mode == "static" and self.activation.dynamic:
            raise ConfigError(
                f"PTQConfig.activation ({self.activation}) has its ranges from run time; choose "
                "mode='dynamic' for all layers, or a LayerRule for some."
            )
        self._check_mode("activation", self.activation)

    def _check_mode(self, where: str, scheme: QuantizationScheme) -> None:
        if self.mode == "weight_only":
            raise ConfigError(f"PTQConfig.{where} has no use with mode='weight_only'; drop one.")
        if self.mode == "dynamic" and not scheme.dynamic:
            raise ConfigError(
                f"PTQConfig.{where} ({scheme}) has a fixed range, which mode='dynamic' never "
                "observes; set dynamic=True in the scheme, or choose mode='static'."
            )

    def _check_data(self) -> None:
        if not self.needs_data:
            for name in ("calibration_data", "calibration_batches", "calibration_forward"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"PTQConfig.{name} has no use with mode='{self.mode}' and without "
                        "bias_correction: nothing is measured on data; drop it."
                    )
            return
        data = self.calibration_data
        is_single = isinstance(data, (Tensor, Mapping, str))
        if data is not None and (is_single or not isinstance(data, Iterable)):
            raise ConfigError(
                "PTQConfig.calibration_data takes an iterable of batches, for example a DataLoader "
                f"or a list; got a {type(data).__name__}. Put a single batch into a list."
            )
        if self.calibration_batches is not None:
            require_integer(self, "calibration_batches", self.calibration_batches, minimum=1)
        if self.calibration_forward is not None and not callable(self.calibration_forward):
            raise ConfigError(
                "PTQConfig.calibration_forward must be a function of the model and a batch, "
                f"got {self.calibration_forward!r}."
            )
        if data is None:
            reason = "mode='static'" if self.mode == "static" else "bias_correction=True"
            raise MissingObjectError(
                f"PTQConfig.calibration_data is missing, which {reason} needs. Pass some batches, "
                "for example a DataLoader (with a recipe: prepare_compression(..., "
                "calibration_data=loader)).",
                option="calibration_data",
            )
