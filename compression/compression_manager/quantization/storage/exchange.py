"""Changing all modules of a model, or none: Parameters to integers, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compression_manager.errors import QuantizationError
from compression_manager.quantization.storage.module import (
    IntegerWeights,
    StoredWeight,
    TiedWeight,
    restore_weights,
    store_weights,
)
from compression_manager.quantization.storage.selection import FoundParameter

Encoded = tuple[StoredWeight, dict[str, Tensor]]
"""What stands for one Parameter: its description, and suffix of the name -> tensor."""


def replace_by_integers(encoded: Iterable[tuple[FoundParameter, Encoded]]) -> None:
    """Replace each Parameter in all of its places; the first place holds the integers.

    Raises:
        QuantizationError: a module's class cannot be derived from. Nothing is changed then.
    """
    stored: dict[nn.Module, dict[str, Encoded]] = {}
    tied: dict[nn.Module, dict[str, TiedWeight]] = {}
    before: dict[nn.Module, dict[str, nn.Parameter]] = {}
    names: dict[nn.Module, str] = {}
    for found, item in encoded:
        owner, owner_name = found.places[0]
        stored.setdefault(owner, {})[owner_name] = item
        for module, name in found.places:
            before.setdefault(module, {})[name] = found.parameter
            names.setdefault(module, found.names[0])
            if (module, name) != (owner, owner_name):
                tied.setdefault(module, {})[name] = TiedWeight(owner, owner_name)
    with _undone_on_error() as changed:
        for module, parameters in before.items():
            try:
                store_weights(module, stored.get(module, {}), tied.get(module, {}))
            except QuantizationError as error:
                raise QuantizationError(f"weight '{names[module]}': {error}") from error
            changed.append((module, parameters))


def replace_by_floats(modules: Sequence[IntegerWeights]) -> None:
    """Give all these modules Parameters again; those that were shared are shared again."""
    parameters: dict[tuple[int, str], nn.Parameter] = {}
    with torch.no_grad():
        for module in modules:
            for name, item in module.stored_weights().items():
                values = module.dequantized(name)
                parameters[id(module), name] = nn.Parameter(values, item.requires_grad)
    for module in modules:
        own = {name: parameters[id(module), name] for name in module.stored_weights()}
        tied = {name: _find_tied(item, parameters) for name, item in module.tied_weights().items()}
        restore_weights(module, own | tied)


@contextmanager
def _undone_on_error() -> Iterator[list[tuple[nn.Module, dict[str, nn.Parameter]]]]:
    """Yield a list of changed modules with their Parameters; restore these on an error."""
    changed: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []
    try:
        yield changed
    except BaseException:
        for module, parameters in reversed(changed):
            if isinstance(module, IntegerWeights):
                restore_weights(module, parameters)
        raise


def _find_tied(
    tied: TiedWeight, parameters: Mapping[tuple[int, str], nn.Parameter]
) -> nn.Parameter:
    """Return the Parameter of the owner, or a new one if the owner stays as it is."""
    known = parameters.get((id(tied.owner), tied.name))
    if known is not None:
        return known
    value = getattr(tied.owner, tied.name)
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value)
