"""What quantization-aware training and post-training quantization have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compression_manager import Plugin, hookimpl
from compression_manager.context import Context
from compression_manager.deploy.conversion import Conversion
from compression_manager.errors import CheckpointMismatchError, QuantizationError
from compression_manager.models.calling import call_with_examples, quiet_evaluation
from compression_manager.quantization import (
    DynamicFakeQuantizer,
    FakeQuantizer,
    ObservedFakeQuantizer,
    QuantizationScheme,
    QuantizationSite,
)
from compression_manager.quantization.fused_paths import disable_fused_paths
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.selection import arithmetic_in_use, prepare_native
from compression_manager.quantization.layers import QuantizedLayer, quantize_parts, restore_layer
from compression_manager.quantization.layers.relu import keep_bits, keep_outputs
from compression_plugins.fake_quant.config import QATConfig
from compression_plugins.fake_quant.convert import can_fold, convert_layer
from compression_plugins.fake_quant.details import publish_layer
from compression_plugins.fake_quant.insertion import make_quantizers
from compression_plugins.fake_quant.pair_finder import ObservedPass, PairFinder
from compression_plugins.fake_quant.pair_watch import PairWatch
from compression_plugins.fake_quant.pass_observer import PassObserver
from compression_plugins.fake_quant.plan import ModelPlan
from compression_plugins.fake_quant.post_training_config import PTQConfig

Options = TypeVar("Options", bound=QATConfig | PTQConfig)


class FakeQuantPlugin(Plugin[Options]):
    """Changes supported layers into quantization-aware ones, and converts them.

    Subclasses set `_plan` in `validate_composition`, and switch the quantizers' phases.
    Observers come from whoever answers `make_observer` (by default the calibration plugin);
    fake quantizers from whoever answers `make_fake_quantizer` (by default this plugin).
    """

    roles = frozenset({"fake_quant"})
    default_providers: ClassVar[Mapping[str, str]] = {"make_observer": "calibration"}

    def __init__(self, config: Options) -> None:
        super().__init__(config)
        self._plan = ModelPlan((), {})
        self._pairs: dict[str, str] | None = None
        self._folded: dict[str, str] = {}
        self._observer: PassObserver | None = None
        self._watch: PairWatch | None = None
        self._parted: dict[str, str] = {}
        self._context: Context | None = None

    def product_options(self) -> ProductOptions:
        """Return how the layers multiply; post-training quantization has no choice to make."""
        return ProductOptions("auto")

    # Shape -----------------------------------------------------------------------------------

    @hookimpl
    def prepare_model(self, context: Context) -> None:
        """Change the planned layers in place."""
        self._context = context
        quantizers = {
            layer.name: make_quantizers(context.services, layer, context.model)
            for layer in self._plan.layers
        }
        for name, of_parts in quantizers.items():
            layer = quantize_parts(context.model.get_submodule(name), of_parts)
            layer.product_options = self.product_options()
            context.add_cleanup(_restoring(layer), owner=self.name)
        if self._computes_on_cpu(context.model):
            reason = prepare_native()
            if reason is not None:
                context.note(self.name, f"no native kernels: {reason}")
            # Layers keep integers of what a ReLU returns, which need not be kept twice.
            context.add_cleanup(keep_bits(context.model), owner=self.name)
        context.add_cleanup(disable_fused_paths(context.model), owner=self.name)
        if context.example_inputs is None:
            self._take_pairs(None)
        else:
            self._take_pairs(_find_pairs(context.model, context.example_inputs))
        self._observer = PassObserver(context.model, context.model_hooks, self._take_pass)
        context.add_cleanup(self._observer.stop, owner=self.name)

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

    # Conversion and metrics ------------------------------------------------------------------

    @hookimpl
    def convert_model(self, conversion: Conversion) -> None:
        """Replace every quantization-aware layer of the copy by its deployed form."""
        model = conversion.model
        keep_outputs(model)
        if self._watch is not None:
            self._watch.settle()
        if conversion.example_inputs is not None:
            # Only the pairs of the model as deployed count: eval mode may take another path.
            deployed = _find_pairs(model, conversion.example_inputs)
            trained = deployed if self._pairs is None else self._pairs
            both = {norm: layer for norm, layer in trained.items() if deployed.get(norm) == layer}
            self._take_pairs(both)
        batch_norm_of = {convolution: name for name, convolution in self._folded.items()}
        for planned in self._plan.layers:
            layer = self._layer(model, planned.name)
            name = batch_norm_of.get(planned.name)
            batch_norm = None if name is None else cast(_BatchNorm, model.get_submodule(name))
            absorbed = () if name is None else (name,)
            conversion.replace(planned.name, convert_layer(layer, batch_norm), absorbed)

    @hookimpl
    def publish_details(self, context: Context) -> None:
        """Publish scale, zero point, range and weight histogram of every layer."""
        for name, layer in self._layers(context.model).items():
            publish_layer(context.metrics, name, layer)

    # State -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return schemes, arithmetic and the conv-BatchNorm pairs; all else is in the model."""
        return {
            "layers": self._schemes(),
            "pairs": self._pairs,
            "arithmetic": arithmetic_in_use(self.product_options()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the pairs that were found.

        Warns if products were computed otherwise, by another CPU for example, so that training
        does not go on to the last bit.

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
        arithmetic = arithmetic_in_use(self.product_options())
        saved_arithmetic = state.get("arithmetic", arithmetic)  # earlier versions saved none
        if saved_arithmetic != arithmetic:
            warnings.warn(
                f"{self.name}: the products of the checkpoint were computed with "
                f"{_words(saved_arithmetic)}; here with {_words(arithmetic)}, which rounds "
                "otherwise.",
                stacklevel=2,
            )
        self._take_pairs(state["pairs"])

    # Internals -------------------------------------------------------------------------------

    def _computes_on_cpu(self, model: nn.Module) -> bool:
        """Return whether layers keep integers between forward and backward, on the CPU."""
        devices = {parameter.device.type for parameter in model.parameters()}
        return self.product_options().forward != "fake" and "cpu" in devices

    def _schemes(self) -> dict[str, str]:
        return {
            layer.name: f"weight {layer.weight or 'none'}, input {layer.activation or 'float'}"
            for layer in self._plan.layers
        }

    def _layers(self, model: nn.Module) -> dict[str, QuantizedLayer]:
        """Return name -> layer of all that is quantized in `model`."""
        return {planned.name: self._layer(model, planned.name) for planned in self._plan.layers}

    def _layer(self, model: nn.Module, name: str) -> QuantizedLayer:
        # In every step, where `get_submodule` asks for each attribute twice.
        layer: nn.Module | None = model
        for child in name.split(".") if name else ():
            layer = None if layer is None else layer._modules.get(child)
        if not isinstance(layer, QuantizedLayer):
            found = "is gone" if layer is None else f"is a {type(layer).__name__} now"
            raise QuantizationError(
                f"plugin '{self.name}': layer '{name}' {found}, no longer the quantization-aware "
                "layer that prepare_compression made of it. Close the manager, change the model, "
                "and prepare it again."
            )
        return layer

    def _take_pairs(self, pairs: Mapping[str, str] | None) -> None:
        """Remember the pairs (None: not known yet) and describe the layers accordingly."""
        assert self._context is not None
        context = self._context
        for name in self._folded:
            context.folded_layers.pop(name, None)
            context.skipped_layers.pop(name, None)
        self._pairs = None if pairs is None else dict(pairs)
        self._folded = self._foldable(context.model)
        self._watch_pairs(context)
        context.folded_layers.update(self._folded)
        context.skipped_layers.update(self._plan.skipped | self._parted)
        for name, convolution in self._folded.items():
            context.skipped_layers[name] = f"folded into '{convolution}' at conversion"

    def _take_pass(self, observed: ObservedPass) -> None:
        """Find the pairs in the first pass; part those that a later one shows apart."""
        if self._pairs is None:
            self._take_pairs(observed.pairs)
        for name, convolution in list(self._folded.items()):
            is_called = not observed.called.isdisjoint((name, convolution))
            if is_called and observed.pairs.get(name) != convolution:
                self._part(name)
        if not self._folded and self._observer is not None:
            self._observer.stop()

    def _watch_pairs(self, context: Context) -> None:
        if self._watch is not None:
            if self._watch.pairs == self._folded:
                return
            self._watch.stop()
        hooks = context.model_hooks
        self._watch = PairWatch(context.model, hooks, self._folded, self._part)

    def _part(self, batch_norm: str) -> None:
        """Fold a BatchNorm no longer, because some pass did not take it for its convolution's."""
        assert self._context is not None
        assert self._pairs is not None  # or nothing was watched
        convolution = self._pairs.pop(batch_norm)
        self._folded.pop(batch_norm)
        if self._watch is not None:
            self._watch.forget(batch_norm)
        self._context.folded_layers.pop(batch_norm)
        self._parted[batch_norm] = (
            f"not folded into '{convolution}': in some pass one was called without the other, or "
            "something else read the convolution's output"
        )
        self._context.skipped_layers.update(self._parted)

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


def _find_pairs(model: nn.Module, inputs: Any) -> dict[str, str]:
    finder = PairFinder(model)
    with quiet_evaluation(model, restore_buffers=True), finder:
        output = call_with_examples(model, inputs)
    return finder.observed(output).pairs


def _restoring(layer: QuantizedLayer) -> Callable[[], None]:
    return lambda: restore_layer(layer)


def _words(arithmetic: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arithmetic.items())
