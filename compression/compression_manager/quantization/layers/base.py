"""What all quantization-aware layers have in common: operands, quantizers, the class change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Self, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.weights import forget_weights
from compression_manager.quantization.quantizers.quantizer_module import FakeQuantizer
from compression_manager.quantization.scheme import QuantizationScheme


class Operand(NamedTuple):
    """What one part of a layer multiplies its input with.

    Attributes:
        weight: (output channels, ...) whatever the layout of the layer's Parameter, so that axis
            0 of a scheme means output channels for every kind; None if the part has no weight.
        bias: (output channels,), or None.
    """

    weight: Tensor | None
    bias: Tensor | None


class Part(NamedTuple):
    """One part of a quantization-aware layer: its operand, and who quantizes what.

    Attributes:
        weight: as in `Operand`.
        bias: as in `Operand`.
        weight_quantizer: fake-quantizes the weight; None if there is no weight.
        input_quantizer: fake-quantizes the part's input; None if that stays in floating point.
    """

    weight: Tensor | None
    bias: Tensor | None
    weight_quantizer: FakeQuantizer | None
    input_quantizer: FakeQuantizer | None


class Quantizers(NamedTuple):
    """The fake quantizers of one part; None where nothing is quantized."""

    weight: FakeQuantizer | None
    input: FakeQuantizer | None


class QuantizedLayer(nn.Module):
    """Mixin of all quantization-aware layers.

    A layer has one part, named "", or several: attention has one for each projection of its
    inputs, an LSTM one for each of its matrices. The quantizers of the part `query` are the
    modules `query_weight_quantizer` and `query_input_quantizer`; those of the part "" are
    `weight_quantizer` and `input_quantizer`.

    Attributes:
        float_class: the class of the layer before and after.
        quantizes_input: False where an input is not a factor of a product (indices) or its
            values inside the kernel cannot be reached.
        product_options: how the layer computes, if it is linear, a convolution or a sum.
    """

    float_class: type[nn.Module]
    quantizes_input: ClassVar[bool] = True
    product_options: ProductOptions = ProductOptions()

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and take a look at the weights anew, even if it is the mode already.

        Around evaluation weights are exchanged, for averaged ones as an example, in ways that
        leave no trace in them.
        """
        forget_weights(self.quantizers())
        return super().train(mode)

    @staticmethod
    def operands_of(layer: nn.Module) -> dict[str, Operand]:
        """Return part -> operand of a layer of the float class (or of this one)."""
        return {"": Operand(cast(Tensor, layer.weight), cast(Tensor | None, layer.bias))}

    def parts(self) -> dict[str, Part]:
        """Return part -> operand and quantizers."""
        return {
            name: Part(operand.weight, operand.bias, *self._quantizers_of(name))
            for name, operand in self.operands_of(self).items()
        }

    def quantizers(self) -> list[FakeQuantizer]:
        """Return the layer's fake quantizers, part by part, the weight's before the input's."""
        return [child for child in self._modules.values() if isinstance(child, FakeQuantizer)]

    def input_quantizers(self) -> list[FakeQuantizer]:
        """Return the fake quantizers of the layer's inputs."""
        found = (self._quantizers_of(name).input for name in self.operands_of(self))
        return [quantizer for quantizer in found if quantizer is not None]

    @property
    def weight_scheme(self) -> QuantizationScheme | None:
        """Scheme of the weights, which is that of all parts; None if there are none."""
        for name in self.operands_of(self):
            quantizer = self._quantizers_of(name).weight
            if quantizer is not None:
                return quantizer.scheme
        return None

    @property
    def input_scheme(self) -> QuantizationScheme | None:
        """Scheme of the inputs, which is that of all parts; None if they stay in float."""
        return next((quantizer.scheme for quantizer in self.input_quantizers()), None)

    def _quantizers_of(self, part: str) -> Quantizers:
        prefix = f"{part}_" if part else ""
        return Quantizers(
            getattr(self, f"{prefix}weight_quantizer"), getattr(self, f"{prefix}input_quantizer")
        )


class SinglePartLayer(QuantizedLayer):
    """A quantization-aware layer with one weight and one input.

    Attributes:
        weight_quantizer: fake-quantizes the weight in every forward pass.
        input_quantizer: fake-quantizes the input, or None for weight-only layers.
    """

    weight: Tensor
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | None

    def part(self) -> Part:
        """Return the only part of the layer."""
        modules = cast(dict[str, Any], self._modules)  # found sooner than as attributes
        return Part(
            *self.operands_of(self)[""], modules["weight_quantizer"], modules["input_quantizer"]
        )

    def quantized_weight(self) -> Tensor:
        """Return the fake-quantized weight, output channels first; dtype of `weight`."""
        return cast(Tensor, self.weight_quantizer(self.operands_of(self)[""].weight))

    def quantized_input(self, input: Tensor) -> Tensor:
        """Return the fake-quantized input, or the input itself in a weight-only layer."""
        if self.input_quantizer is None:
            return input
        return cast(Tensor, self.input_quantizer(input))


def place_quantizers(layer: QuantizedLayer, part: str, quantizers: Quantizers) -> None:
    """Make `quantizers` those of the part `part`."""
    prefix = f"{part}_" if part else ""
    layer.add_module(f"{prefix}weight_quantizer", quantizers.weight)
    layer.add_module(f"{prefix}input_quantizer", quantizers.input)


def has_hooks(module: nn.Module) -> bool:
    """Return whether somebody looks at what goes in or out of `module`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def weight_identity(weight: Tensor) -> tuple[object, ...]:
    """Return what is equal for two views of the same values of one living Parameter."""
    base = weight if weight._base is None else weight._base
    return id(base), weight.storage_offset(), weight.shape, weight.stride()


def restore_layer(layer: QuantizedLayer) -> None:
    """Turn the layer back into the float layer that it was."""
    for name in list(_quantizer_names(layer)):
        delattr(layer, name)
    vars(layer).pop("product_options", None)
    restored = _float_class_of(layer)
    layer.__class__ = restored  # type: ignore[assignment]  # mypy allows no class change


def _float_class_of(layer: QuantizedLayer) -> type[nn.Module]:
    if not parametrize.is_parametrized(layer):
        return layer.float_class
    # Registered later than the layer was prepared, torch derived a class of it, which has the
    # computed tensors as properties.
    name = f"Parametrized{layer.float_class.__name__}"
    return type(name, (layer.float_class,), dict(vars(type(layer))))


def _quantizer_names(layer: QuantizedLayer) -> Iterator[str]:
    for part in layer.operands_of(layer):
        prefix = f"{part}_" if part else ""
        yield f"{prefix}weight_quantizer"
        yield f"{prefix}input_quantizer"
