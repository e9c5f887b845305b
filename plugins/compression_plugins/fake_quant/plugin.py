"""The quantization-aware training plugin: phases, and frozen BatchNorm statistics."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compression_manager import hookimpl
from compression_manager.context import Context
from compression_manager.deploy.conversion import Conversion
from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.weights import forget_trained_weights
from compression_plugins.fake_quant.base import FakeQuantPlugin
from compression_plugins.fake_quant.config import QATConfig
from compression_plugins.fake_quant.plan import plan_model

# Names of layers in a message.
_SHOWN = 5


class QATPlugin(FakeQuantPlugin[QATConfig]):
    """Changes supported layers into quantization-aware ones and steers their phases."""

    config_class = QATConfig

    def __init__(self, config: QATConfig) -> None:
        super().__init__(config)
        self._batch_norm_is_frozen = False

    def required_hooks(self) -> frozenset[str]:
        """Return the hook that counts epochs, if a phase begins at one."""
        config = self.config
        phases = (
            config.observe_at,
            config.fake_quantize_at,
            config.freeze_observers_at,
            config.freeze_batch_norm_at,
        )
        counts_epochs = any(phase is not None and phase.epoch is not None for phase in phases)
        return frozenset({"on_epoch_begin"} if counts_epochs else ())

    def product_options(self) -> ProductOptions:
        """Return how the layers multiply."""
        return self.config.products

    # Shape -----------------------------------------------------------------------------------

    @hookimpl
    def validate_composition(self, context: Context) -> None:
        """Plan everything, so that mistakes show before the model is touched."""
        self._plan = plan_model(context.model, self.config)

    # Phases ----------------------------------------------------------------------------------

    @hookimpl
    def on_step_begin(self, context: Context) -> None:
        """Switch the phases that are due at this step, before its forward pass."""
        reached = {"global_step": context.global_step, "epoch": context.epoch}
        config = self.config
        frozen = config.freeze_observers_at
        observing = config.observe_at.reached(**reached) and not (
            frozen is not None and frozen.reached(**reached)
        )
        quantizing = config.fake_quantize_at.reached(**reached)
        for layer in self._layers(context.model).values():
            for quantizer in layer.quantizers():
                if quantizer.phase != (observing, quantizing):
                    quantizer.set_phase(observing=observing, quantizing=quantizing)
        if config.freeze_batch_norm_at is not None and config.freeze_batch_norm_at.reached(
            **reached
        ):
            self._freeze_batch_norm(context)

    @hookimpl
    def on_before_eval(self, context: Context) -> None:
        """Let ranges follow nothing, whether or not the user calls `model.eval()`."""
        self._pause(context, paused=True)

    @hookimpl
    def on_after_eval(self, context: Context) -> None:
        """Let ranges follow the data again."""
        self._pause(context, paused=False)

    @hookimpl
    def on_after_optimizer_step(self) -> None:
        """Quantize the weights anew, if the optimizer is none of torch's."""
        forget_trained_weights()

    # Conversion ------------------------------------------------------------------------------

    @hookimpl
    def convert_model(self, conversion: Conversion) -> None:
        """Replace every quantization-aware layer of the copy by its deployed form.

        Raises:
            QuantizationError: fake quantization has not begun, or nothing was observed.
        """
        self._check_trained(conversion.model)
        self._warn_of_float_inputs(conversion.model)
        super().convert_model(conversion)

    # Internals -------------------------------------------------------------------------------

    def _pause(self, context: Context, *, paused: bool) -> None:
        for layer in self._layers(context.model).values():
            for quantizer in layer.quantizers():
                quantizer.paused = paused

    def _check_trained(self, model: nn.Module) -> None:
        """Raise QuantizationError unless the layers compute on integers by now."""
        layers = self._layers(model).values()
        if not all(
            quantizer.phase.quantizing for layer in layers for quantizer in layer.quantizers()
        ):
            raise QuantizationError(
                f"plugin '{self.name}': fake quantization has not begun, so that the converted "
                f"model would not be the trained one; it begins at {self.config.fake_quantize_at}, "
                "counted in optimizer steps and epochs through this manager's hooks. Train on "
                "before converting."
            )
        inputs = [quantizer for layer in layers for quantizer in layer.input_quantizers()]
        if inputs and not any(quantizer.is_calibrated() for quantizer in inputs):
            raise QuantizationError(
                f"plugin '{self.name}': no layer has observed the range of its input; observers "
                f"start at {self.config.observe_at}. Train on before converting."
            )

    def _warn_of_float_inputs(self, model: nn.Module) -> None:
        """Tell which layers have no range for their input, although evaluation uses them."""
        unseen = [
            f"'{name}'"
            for name, layer in self._layers(model).items()
            if any(
                quantizer.called_in_eval_mode and not quantizer.is_calibrated()
                for quantizer in layer.input_quantizers()
            )
        ]
        if unseen:
            shown, more = ", ".join(unseen[:_SHOWN]), len(unseen) - _SHOWN
            shown += f" and {more} more layers" if more > 0 else ""
            warnings.warn(
                f"plugin '{self.name}': {shown} met values in eval mode only, so that the range "
                "of their input is unknown and stays float. Call them in train mode in some steps, "
                "with inputs that are not empty, or leave them out with "
                "LayerRule(layer=..., skip=True). Their parameters may be frozen meanwhile, and "
                "freeze_batch_norm_at=StartAt(step=0) keeps the statistics of BatchNorm.",
                stacklevel=2,
            )

    def _freeze_batch_norm(self, context: Context) -> None:
        if not self._batch_norm_is_frozen:
            self._batch_norm_is_frozen = True
            frozen = [module for module in _batch_norms(context.model) if module.training]
            context.add_cleanup(lambda: _unfreeze(context.model, frozen), owner=self.name)
            for module in _batch_norms(context.model):
                # Whatever the user's loop calls train() on, and whenever.
                context.model_hooks.add_forward_pre_hook(module, _set_eval)
        for module in _batch_norms(context.model):
            module.eval()


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _set_eval(module: nn.Module, args: Any) -> None:
    if module.training:
        module.eval()


def _unfreeze(model: nn.Module, frozen: list[_BatchNorm]) -> None:
    for module in frozen:
        module.train(model.training)
