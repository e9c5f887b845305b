"""Attributes that several holders change come back, whoever gives them back first."""

import copy
import gc
import itertools

import pytest
from torch import nn

from compression_manager.models import held_attributes
from compression_manager.models.held_attributes import hold


def changed(module, *values):
    """One holder for each value, who sets `training` to it."""
    holders = []
    for value in values:
        holders.append(hold([(module, "training")]))
        module.training = value
    return holders


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_latest_holder_that_is_left_has_its_value(order):
    module = nn.Linear(2, 2)
    module.training = "before"
    values = ["first", "second", "third"]
    holders, left = changed(module, *values), list(values)
    for index in order:
        holders[index]()
        left.remove(values[index])
        assert module.training == (left[-1] if left else "before")


def test_a_holder_that_never_gives_back_hides_no_later_change():
    module = nn.Linear(2, 2)
    changed(module, "forgotten")
    module.training = "by the user"
    changed(module, "later")[0]()
    assert module.training == "by the user"


def test_one_parameter_under_two_names_comes_back():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    places = [(item, f"{name}.requires_grad") for item in model for name in ("weight", "bias")]
    give_back = hold(places)
    model.requires_grad_(False)
    give_back()
    assert [item.requires_grad for item in model.parameters()] == [True, False, True]


def test_a_parameter_that_was_replaced_or_deleted_is_no_error():
    module = nn.Linear(2, 2)
    give_back = hold([(module, "weight.requires_grad"), (module, "bias.requires_grad")])
    module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    del module.bias
    give_back()
    assert module.weight.requires_grad


def test_no_module_is_kept_alive_and_copies_are_not_held():
    gc.collect()
    count = len(held_attributes._holds)
    module = nn.Linear(2, 2)
    holders = changed(module, False)
    copied = copy.deepcopy(module)
    assert len(held_attributes._holds) == count + 1
    del module, holders
    gc.collect()
    assert len(held_attributes._holds) == count
    assert copied.training is False
