"""Which weights of a model are stored as integers, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from compression_manager.errors import ConfigError, suggest

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(eq=False)
class FoundParameter:
    """One Parameter of a model, with all its places.

    Attributes:
        parameter: itself.
        names: its qualified names; the first is that of the first place.
        places: (module, attribute) for each name; several modules if it is tied.
        reason: why it stays in floating point; None if it does not.
    """

    parameter: nn.Parameter
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    reason: str | None = None

    @property
    def layer(self) -> str:
        """Qualified name of the first module that holds it."""
        return self.names[0].rpartition(".")[0]


def find_parameters(model: nn.Module, skip: Sequence[str]) -> list[FoundParameter]:
    """Return the Parameters of `model` in its order, each once.

    Args:
        model: any module.
        skip: names or globs of layers (with all that is inside of them) and of weights.

    Raises:
        ConfigError: an entry of `skip` matches no layer and no weight.
    """
    found: dict[int, FoundParameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            item = found.setdefault(id(parameter), FoundParameter(parameter))
            item.names.append(f"{prefix}.{name}" if prefix else name)
            item.places.append((module, name))
    _check_skip(skip, list(found.values()))
    for item in found.values():
        item.reason = _reason_against(item, skip)
    return list(found.values())


def _reason_against(found: FoundParameter, skip: Sequence[str]) -> str | None:
    for pattern in skip:
        if _matches(pattern, found):
            return f"skipped by '{pattern}'"
    parameter = found.parameter
    if parameter.dtype not in _DTYPES:
        return f"its dtype is {parameter.dtype}"
    if is_lazy(parameter):
        return None
    if parameter.dim() < 2:
        return "it has fewer than two dimensions"
    return None if parameter.numel() else "it is empty"


def _matches(pattern: str, found: FoundParameter) -> bool:
    return any(fnmatchcase(name, pattern) for name in _names(found))


def _names(found: FoundParameter) -> set[str]:
    """Return the names of the Parameter and of all modules around it."""
    names = set()
    for name in found.names:
        while name:
            names.add(name)
            name = name.rpartition(".")[0]
    return names


def _check_skip(skip: Sequence[str], found: Sequence[FoundParameter]) -> None:
    for pattern in skip:
        if not any(_matches(pattern, item) for item in found):
            names = {name for item in found for name in _names(item)}
            raise ConfigError(
                f"Quantizer.skip: '{pattern}' matches no layer and no weight; "
                f"{suggest(pattern, names)}"
            )
