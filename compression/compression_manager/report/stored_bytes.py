"""How many bytes a model's layers take, before conversion and after."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.kinds import CONVERTED_CLASSES
from compression_manager.deploy.layers.layer_spec import LayerSpec
from compression_manager.quantization.layers import QuantizedLayer, weight_identity


class StoredBytes:
    """Counts the bytes of each tensor once, however many layers share it."""

    def __init__(self) -> None:
        self._counted: set[int] = set()
        self._integers: dict[tuple[object, object], tuple[str, Tensor]] = {}

    def take(self, tensors: Iterable[Tensor]) -> int:
        """Return the bytes of those tensors that were not counted yet."""
        total = 0
        for tensor in tensors:
            if id(tensor) not in self._counted:
                self._counted.add(id(tensor))
                total += _bytes(tensor)
        return total

    def take_converted(
        self, name: str, layer: QuantizedLayer, spec: LayerSpec, *, gains_bias: bool
    ) -> tuple[int, list[str]]:
        """Return the bytes of a layer after conversion.

        Args:
            name: qualified name of the layer.
            layer: the quantization-aware layer.
            spec: what conversion makes of it.
            gains_bias: whether a BatchNorm is folded into it, which gives it integers of its own.

        Returns:
            the bytes, without those of integers that earlier layers hold, and these layers' names.
        """
        parts = layer.parts()
        converted = CONVERTED_CLASSES[spec.kind](layer, spec)
        modules = [converted, *(converted.get_submodule(part) for part in parts)]
        held = {id(item): item for module in modules for item in module.buffers(recurse=False)}
        others = []
        for part_name, part in parts.items():
            if part.weight is None or gains_bias:
                continue
            place = ".".join(filter(None, (name, part_name)))
            other = self._first_with_integers(place, part.weight, spec.weight)
            if other is not None:
                others.append(other)
                shared = cast(ConvertedLayer, converted.get_submodule(part_name))
                for tensor in shared.weight_tensors().values():
                    held.pop(id(tensor))
        return sum(map(_bytes, held.values())), others

    def _first_with_integers(self, name: str, weight: Tensor, scheme: object) -> str | None:
        """Return the earlier layer whose integers are those of `weight` as well."""
        # The weight is kept as well, so that its identity stays its own.
        first, _ = self._integers.setdefault((weight_identity(weight), scheme), (name, weight))
        return None if first == name else first


def saved_tensors(module: nn.Module) -> list[Tensor]:
    """Return the module's own tensors that a state_dict holds."""
    buffers = [
        buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    return [*module.parameters(recurse=False), *buffers]


def _bytes(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()
