"""From a trained, quantization-aware model to a deployed copy, checked for parity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.parity import Parity, check_parity
from compression_manager.deploy.replacement import Replacement
from compression_manager.errors import ConfigError
from compression_manager.models.copying import copy_model
from compression_manager.quantization.fused_paths import disable_fused_paths
from compression_manager.quantization.layers import QuantizedLayer, weight_identity


@dataclass
class Conversion:
    """The copy that plugins convert in `convert_model`.

    Attributes:
        model: an eval-mode copy of the trained model, to be changed in place.
        example_inputs: what the model can be called with, or None.
        replacements: what was replaced so far.
        parity: the comparison with the trained model; None if there was no input to compare on.
        accepted: whether a plugin called `accept`.
    """

    model: nn.Module
    example_inputs: Any = None
    replacements: list[Replacement] = field(default_factory=list)
    parity: Parity | None = None
    accepted: bool = False
    _swaps: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, init=False)
    _places: dict[int, list[tuple[nn.Module, str]]] = field(default_factory=dict, init=False)

    def replace(self, name: str, layer: ConvertedLayer, absorbs: Sequence[str] = ()) -> None:
        """Put `layer` in place of the module `name`, under all names that the module has.

        Args:
            name: qualified name in `model`.
            layer: the deployed layer.
            absorbs: names of the modules directly behind it whose work `layer` does as well.
        """
        self._swap(name, layer)
        for other in absorbs:
            self._swap(other, nn.Identity().eval())
        self.replacements.append(Replacement(name, layer, tuple(absorbs)))

    def accept(self) -> None:
        """Say that the copy is worth deploying though no layer is replaced, as after pruning.

        Without this, a conversion that replaces nothing is refused.
        """
        self.accepted = True

    def undo(self) -> None:
        """Put every replaced module back."""
        while self._swaps:
            parent, child, old = self._swaps.pop()
            _set_child(parent, child, old)
        self.replacements.clear()
        self._places.clear()

    def _swap(self, name: str, new: nn.Module) -> None:
        old = self.model.get_submodule(name)
        if old is self.model:
            self.model = new
            return
        for parent, child in self._places_of(old):
            _set_child(parent, child, new)
            self._swaps.append((parent, child, old))
            self._places.setdefault(id(new), []).append((parent, child))
        # Such as the layers of an attention, which its replacement takes over.
        for module, places in _all_places(new).items():
            self._places.setdefault(module, []).extend(places)

    def _places_of(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return every (parent, name) of a module; the whole model is searched once, not each time.

        It is searched again if it is not as it was found, because a plugin changed it otherwise.
        """
        places = self._places.get(id(module), [])
        if not places or any(parent._modules.get(name) is not module for parent, name in places):
            self._places = _all_places(self.model)
            places = self._places[id(module)]
        return list(places)


def _all_places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, name))
    return places


def _set_child(parent: nn.Module, name: str, child: nn.Module) -> None:
    setattr(parent, name, child)
    if name == "_orig_mod" and hasattr(parent, "_initialize"):
        # What torch.compile returns holds on to the call of the module that it was made for.
        cast(Any, parent)._initialize()


def convert_copy(
    model: nn.Module, convert: Callable[[Conversion], object], example_inputs: Any
) -> Conversion:
    """Return the conversion of a copy of `model`; `model` itself is left untouched.

    The copy lacks the forward and backward hooks that were registered from outside; if one of
    them changes what a layer returns, the parity check finds it. Its Parameters, of layers that
    stay in floating point, need no gradient: else all layers behind them would compute with
    floats that autograd can follow, unless they are called without gradients.

    Args:
        model: the trained model.
        convert: replaces layers of the conversion's model.
        example_inputs: what to compare both models on, or None to leave that out.

    Raises:
        ConfigError: nothing was replaced or accepted, or the model does not take `example_inputs`.
        ParityError: a replaced layer computes something else.
        QuantizationError: the model cannot be copied.
    """
    conversion = Conversion(copy_model(model, keep_user_hooks=False), example_inputs)
    convert(conversion)
    if not conversion.replacements and not conversion.accepted:
        raise ConfigError(
            "nothing was converted: no plugin of this manager quantizes or prunes layers; list "
            "QATConfig()."
        )
    # Nothing can be undone from here on, and what was replaced holds the float weights.
    conversion._swaps.clear()
    conversion._places.clear()
    disable_fused_paths(conversion.model)
    _end_training(conversion.model, model)
    _share_tied_weights(model, conversion.replacements)
    if example_inputs is not None:
        conversion.parity = check_parity(
            copy_model(model, keep_user_hooks=True),
            conversion.model,
            conversion.replacements,
            example_inputs,
        )
    return conversion


def _end_training(copy: nn.Module, model: nn.Module) -> None:
    """Let the Parameters of `copy` need no gradient, but for those that are the model's own.

    A module that cannot be copied, or that the copy shares on purpose, is still trained.
    """
    trained = {id(parameter) for parameter in model.parameters()}
    for parameter in copy.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def _share_tied_weights(model: nn.Module, replacements: Sequence[Replacement]) -> None:
    """Let layers whose float weight is one Parameter share their integers as well."""
    first: dict[tuple[object, ...], tuple[Tensor, ConvertedLayer]] = {}
    for replacement in replacements:
        layer = model.get_submodule(replacement.name)
        if not isinstance(layer, QuantizedLayer):
            continue  # a plugin replaced a layer that it does not train
        for part, (weight, *_) in layer.parts().items():
            if weight is None:
                continue
            converted = cast(ConvertedLayer, replacement.layer.get_submodule(part))
            # The weight is kept as well, so that its identity stays its own.
            _, other = first.setdefault(weight_identity(weight), (weight, converted))
            if other is not converted:
                converted.share_weight(other)
