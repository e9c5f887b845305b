"""Replacing many layers searches the model once, and still finds what was changed meanwhile."""

from __future__ import annotations

import pytest
from torch import nn

from compression_manager.deploy.conversion import Conversion


def test_every_place_of_a_shared_module_is_replaced_and_put_back() -> None:
    shared, new = nn.Linear(2, 2), nn.Identity()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    conversion = Conversion(model)
    conversion.replace("a", new)
    assert model["a"] is new
    assert model["b"][0] is new
    conversion.replace("b.0", nn.Tanh())
    assert isinstance(model["a"], nn.Tanh)
    conversion.undo()
    assert not conversion.replacements
    assert model["a"] is shared
    assert model["b"][0] is shared


def test_a_layer_that_a_replacement_took_over_is_replaced_in_it() -> None:
    inner, new = nn.Linear(2, 2), nn.Identity()
    model = nn.ModuleDict({"outer": nn.ModuleDict({"inner": inner})})
    conversion = Conversion(model)
    conversion.replace("outer", nn.ModuleDict({"inner": inner}))
    conversion.replace("outer.inner", new)
    assert model["outer"]["inner"] is new
    conversion.undo()
    assert model["outer"]["inner"] is inner


def test_what_a_plugin_changed_otherwise_is_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    conversion = Conversion(model)
    conversion.replace("0", nn.Identity())
    added = nn.Linear(2, 2)
    model[1] = nn.Sequential(added)
    new = nn.Identity()
    conversion.replace("1.0", new)
    assert model[1][0] is new


def test_the_model_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    searches = []
    modules = nn.Module.modules
    monkeypatch.setattr(nn.Module, "modules", lambda self: searches.append(self) or modules(self))
    conversion = Conversion(model)
    for number in range(20):
        conversion.replace(str(number), nn.Identity())
    assert searches.count(model) == 1
    assert all(isinstance(layer, nn.Identity) for layer in model)
