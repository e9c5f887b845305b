"""From a trained, quantization-aware model to a deployed copy, checked for parity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compression_manager.deploy.layers import ConvertedLayer
from compression_manager.deploy.parity import Parity, check_parity
from compression_manager.errors import ConfigError, QuantizationError
from compression_manager.model_hooks import strip_inert_hooks
from compression_manager.quantization.fused_paths import disable_fused_paths


@dataclass(frozen=True)
class Replacement:
    """One layer that was replaced.

    Attributes:
        name: qualified name of the layer.
        layer: what stands there now.
        absorbed: names of the modules that the layer also computes; they became Identity.
    """

    name: str
    layer: ConvertedLayer
    absorbed: tuple[str, ...] = ()

    @property
    def output_of(self) -> str:
        """Name of the module whose output in training the layer computes."""
        return self.absorbed[-1] if self.absorbed else self.name


@dataclass
class Conversion:
    """The copy that plugins convert in `convert_model`.

    Attributes:
        model: an eval-mode copy of the trained model, to be changed in place.
        replacements: what was replaced so far.
        parity: the comparison with the trained model; None if there was no input to compare on.
    """

    model: nn.Module
    replacements: list[Replacement] = field(default_factory=list)
    parity: Parity | None = None

    def replace(self, name: str, layer: ConvertedLayer, absorbs: Sequence[str] = ()) -> None:
        """Put `layer` in place of the module `name`.

        Args:
            name: qualified name in `model`.
            layer: the deployed layer.
            absorbs: names of the modules directly behind it whose work `layer` does as well.
        """
        self._set(name, layer)
        for other in absorbs:
            self._set(other, nn.Identity())
        self.replacements.append(Replacement(name, layer, tuple(absorbs)))

    def _set(self, name: str, module: nn.Module) -> None:
        if not name:
            self.model = module
            return
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


def convert_copy(
    model: nn.Module, convert: Callable[[Conversion], object], example_inputs: Any
) -> Conversion:
    """Return the conversion of a copy of `model`; `model` itself is left untouched.

    Args:
        model: the trained model.
        convert: replaces layers of the conversion's model.
        example_inputs: what to compare both models on, or None to leave that out.

    Raises:
        ConfigError: nothing was replaced.
        ParityError: a replaced layer computes something else.
        QuantizationError: the model cannot be copied.
    """
    conversion = Conversion(_inert_copy(model))
    convert(conversion)
    if not conversion.replacements:
        raise ConfigError(
            "nothing was converted: no plugin of this manager quantizes layers; list QATConfig()."
        )
    disable_fused_paths(conversion.model)
    if example_inputs is not None:
        trained = _inert_copy(model)
        conversion.parity = check_parity(
            trained, conversion.model, conversion.replacements, example_inputs
        )
    return conversion


def _inert_copy(model: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(model)
    except RuntimeError as error:
        raise QuantizationError(
            f"the model cannot be copied ({error}); a module probably keeps an activation as an "
            "attribute. Delete such attributes before converting."
        ) from error
    strip_inert_hooks(copied)
    return copied.eval()
