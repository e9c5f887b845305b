"""Attributes that several managers change at a time, and give back in any order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


class _Hold:
    """What a holder found, and has to give back."""

    def __init__(self, found: Any) -> None:
        self.found = found


# Per module and attribute, in the order in which they came.
_holds: WeakKeyDictionary[nn.Module, dict[str, list[_Hold]]] = WeakKeyDictionary()


def hold(places: Iterable[tuple[nn.Module, str]]) -> Callable[[], None]:
    """Remember attributes before they are changed; return a function that gives them back.

    Several holders of an attribute may give it back in any order: it keeps what the latest of
    those who still hold it has set, and in the end is what it was before the first. Managers that
    share a teacher close one after the other.

    Args:
        places: modules and attributes, for example `training` or `weight.requires_grad`. One that
            does not exist any more when it is given back is left out.
    """
    places = list(places)
    # All before any is given to the caller: two names may be one parameter.
    held = [(module, path, _Hold(operator.attrgetter(path)(module))) for module, path in places]
    for module, path, own in held:
        _holds.setdefault(module, {}).setdefault(path, []).append(own)

    def give_back() -> None:
        for module, path, own in reversed(held):
            holders = _holds[module][path]
            index = holders.index(own)
            del holders[index]
            if index < len(holders):
                holders[index].found = own.found
            else:
                _set(module, path, own.found)

    return give_back


def _set(module: nn.Module, path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    try:
        owner = operator.attrgetter(parent)(module) if parent else module
    except AttributeError:
        return
    setattr(owner, name, value)
