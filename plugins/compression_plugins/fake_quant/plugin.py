"""The quantization-aware training plugin: class change, phases, conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compression_manager import Plugin, hookimpl
from compression_manager.context import Context
from compression_manager.deploy.conversion import Conversion
from compression_manager.errors import CheckpointMismatchError, QuantizationError
from compression_manager.model_call import call_with_examples, quiet_evaluation
from compression_manager.quantization import (
    DynamicFakeQuantizer,
    FakeQuantizer,
    ObservedFakeQuantizer,
    QuantizationScheme,
    QuantizationSite,
)
from compression_manager.quantization.fused_paths import disable_fused_paths
from compression_manager.quantization.layers import QuantizedLayer, quantize_layer, restore_layer
from compression_plugins.fake_quant.batch_norm import PairFinder, observe_next_forward
from compression_plugins.fake_quant.config import QATConfig
from compression_plugins.fake_quant.convert import can_fold, convert_layer
from compression_plugins.fake_quant.details import publish_layer
from compression_plugins.fake_quant.plan import LayerPlan, ModelPlan, plan_model


class QATPlugin(Plugin[QATConfig]):
    """Changes supported layers into quantization-aware ones and steers their phases.

    Observers come from whoever answers `make_observer` (by default the calibration plugin);
    fake quantizers from whoever answers `make_fake_quantizer` (by default this plugin).
    """

    config_class = QATConfig
    roles = frozenset({"fake_quant"})
    default_providers: ClassVar[Mapping[str, str]] = {"make_observer": "calibration"}

    def __init__(self, config: QATConfig) -> None:
        super().__init__(config)
        self._plan = ModelPlan((), {})
        self._pairs: dict[str, str] | None = None
        self._folded: dict[str, str] = {}
        self._context: Context | None = None
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

    # Shape -----------------------------------------------------------------------------------

    @hookimpl
    def validate_composition(self, context: Context) -> None:
        """Plan everything, so that mistakes show before the model is touched."""
        self._plan = plan_model(context.model, self.config)

    @hookimpl
    def prepare_model(self, context: Context) -> None:
        """Change the planned layers in place."""
        self._context = context
        quantizers = {
            layer.name: self._make_quantizers(context, layer) for layer in self._plan.layers
        }
        for name, (weight_quantizer, input_quantizer) in quantizers.items():
            layer = quantize_layer(
                context.model.get_submodule(name), weight_quantizer, input_quantizer
            )
            context.add_cleanup(_restoring(layer), owner=self.name)
        context.add_cleanup(disable_fused_paths(context.model), owner=self.name)
        if context.example_inputs is None:
            self._take_pairs(None)
            observe_next_forward(context.model, context.model_hooks, self._take_pairs)
        else:
            self._take_pairs(_find_pairs(context.model, context.example_inputs))

    @hookimpl(trylast=True)
    def make_fake_quantizer(
        self, scheme: QuantizationScheme, site: QuantizationSite
    ) -> FakeQuantizer:
        """Answer the service with a quantizer that follows an observer, or the input itself."""
        if scheme.dynamic:
            return DynamicFakeQuantizer(scheme, site)
        assert self._context is not None  # services answer from prepare_model on
        observer = self._context.services.make_observer(scheme, site)
        return ObservedFakeQuantizer(scheme, site, observer)

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
        for layer in self._layers(context.model):
            for quantizer in layer.quantizers():
                if tuple(quantizer.phase) != (observing, quantizing):
                    quantizer.set_phase(observing=observing, quantizing=quantizing)
        if config.freeze_batch_norm_at is not None and config.freeze_batch_norm_at.reached(
            **reached
        ):
            self._freeze_batch_norm(context)

    # Conversion and metrics ------------------------------------------------------------------

    @hookimpl
    def convert_model(self, conversion: Conversion) -> None:
        """Replace every quantization-aware layer of the copy by its deployed form.

        Raises:
            QuantizationError: fake quantization has not begun, or nothing was observed.
        """
        model = conversion.model
        self._check_trained(model)
        if conversion.example_inputs is not None:
            # Only the pairs of the model as deployed count: eval mode may take another path.
            deployed = _find_pairs(model, conversion.example_inputs)
            trained = deployed if self._pairs is None else self._pairs
            self._take_pairs(dict(deployed.items() & trained.items()))
        batch_norm_of = {convolution: name for name, convolution in self._folded.items()}
        for planned in self._plan.layers:
            layer = cast(QuantizedLayer, model.get_submodule(planned.name))
            name = batch_norm_of.get(planned.name)
            batch_norm = None if name is None else cast(_BatchNorm, model.get_submodule(name))
            absorbed = () if name is None else (name,)
            conversion.replace(planned.name, convert_layer(layer, batch_norm), absorbed)

    @hookimpl
    def publish_details(self, context: Context) -> None:
        """Publish scale, zero point, range and weight histogram of every layer."""
        for planned in self._plan.layers:
            layer = cast(QuantizedLayer, context.model.get_submodule(planned.name))
            publish_layer(context.metrics, planned.name, layer)

    # State -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the layers' schemes and the conv-BatchNorm pairs; all else is in the model."""
        return {"layers": self._schemes(), "pairs": self._pairs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the pairs that were found.

        Raises:
            CheckpointMismatchError: other layers are quantized, or with other schemes.
        """
        saved, own = state["layers"], self._schemes()
        for name in sorted(saved.keys() | own.keys()):
            if saved.get(name) != own.get(name):
                raise CheckpointMismatchError(
                    f"plugin '{self.name}': layer '{name}' is quantized otherwise in the "
                    f"checkpoint: {saved.get(name, 'not at all')}; here: "
                    f"{own.get(name, 'not at all')}."
                )
        self._take_pairs(state["pairs"])

    # Internals -------------------------------------------------------------------------------

    def _schemes(self) -> dict[str, str]:
        return {
            layer.name: f"weight {layer.weight}, input {layer.activation or 'float'}"
            for layer in self._plan.layers
        }

    def _make_quantizers(
        self, context: Context, planned: LayerPlan
    ) -> tuple[FakeQuantizer, FakeQuantizer | None]:
        weight = cast(nn.Linear, context.model.get_submodule(planned.name)).weight
        axis = planned.weight.axis
        channels = None if axis is None else weight.shape[axis]
        shape = tuple(weight.shape)
        site = QuantizationSite(planned.name, "weight", channels, weight.device, shape)
        weight_quantizer = context.services.make_fake_quantizer(planned.weight, site)
        if planned.activation is None:
            return weight_quantizer, None
        site = QuantizationSite(planned.name, "activation", None, weight.device)
        return weight_quantizer, context.services.make_fake_quantizer(planned.activation, site)

    def _layers(self, model: nn.Module) -> list[QuantizedLayer]:
        return [
            cast(QuantizedLayer, model.get_submodule(planned.name)) for planned in self._plan.layers
        ]

    def _take_pairs(self, pairs: Mapping[str, str] | None) -> None:
        """Remember the pairs (None: not known yet) and describe the layers accordingly."""
        assert self._context is not None
        context = self._context
        for name in self._folded:
            context.folded_layers.pop(name, None)
            context.skipped_layers.pop(name, None)
        self._pairs = None if pairs is None else dict(pairs)
        self._folded = self._foldable(context.model)
        context.folded_layers.update(self._folded)
        context.skipped_layers.update(self._plan.skipped)
        for name, convolution in self._folded.items():
            context.skipped_layers[name] = f"folded into '{convolution}' at conversion"

    def _check_trained(self, model: nn.Module) -> None:
        """Raise QuantizationError unless the layers compute on integers by now."""
        layers = self._layers(model)
        if not all(
            quantizer.phase.quantizing for layer in layers for quantizer in layer.quantizers()
        ):
            raise QuantizationError(
                f"plugin '{self.name}': fake quantization has not begun, so that the converted "
                f"model would not be the trained one; it begins at {self.config.fake_quantize_at}, "
                "counted in optimizer steps and epochs through this manager's hooks. Train on "
                "before converting."
            )
        inputs = [layer.input_quantizer for layer in layers if layer.input_quantizer is not None]
        if inputs and not any(quantizer.is_calibrated() for quantizer in inputs):
            raise QuantizationError(
                f"plugin '{self.name}': no layer has observed the range of its input; observers "
                f"start at {self.config.observe_at}. Train on before converting."
            )

    def _foldable(self, model: nn.Module) -> dict[str, str]:
        """Return BatchNorm name -> convolution name where folding changes only scales."""
        found = {}
        for name, convolution in (self._pairs or {}).items():
            layer = model.get_submodule(convolution)
            if isinstance(layer, QuantizedLayer) and can_fold(
                layer, cast(_BatchNorm, model.get_submodule(name))
            ):
                found[name] = convolution
        return found

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


def _find_pairs(model: nn.Module, inputs: Any) -> dict[str, str]:
    finder = PairFinder(model)
    with quiet_evaluation(model), finder:
        output = call_with_examples(model, inputs)
    return finder.pairs(output)


def _restoring(layer: QuantizedLayer) -> Callable[[], None]:
    return lambda: restore_layer(layer)


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _set_eval(module: nn.Module, args: Any) -> None:
    if module.training:
        module.eval()


def _unfreeze(model: nn.Module, frozen: list[_BatchNorm]) -> None:
    for module in frozen:
        module.train(model.training)
