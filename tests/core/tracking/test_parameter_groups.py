"""Parameters of plugins are a group of their own in the user's optimizer, and leave it at close."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.optim.lr_scheduler as lr
from torch import nn

import toys
from compression_manager import ConfigError, LifecycleError, prepare_compression
from parameter_creators import creator, extras, step
from probes import begin_step, call_loss, probe, run_step


def memberships(optimizer: Any) -> list[list[int]]:
    return [[id(value) for value in group["params"]] for group in optimizer.param_groups]


# The group ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("built", ["before", "after"])
@pytest.mark.parametrize("named", [False, True])
def test_own_group_with_options_of_the_first(built: str, named: bool) -> None:
    model = toys.mlp()

    def build() -> Any:
        values = model.named_parameters() if named else model.parameters()
        return torch.optim.AdamW(values, 0.5, betas=(0.7, 0.8), weight_decay=0.25)

    optimizer = build() if built == "before" else None
    manager = prepare_compression(model, [creator(learning_rate_factor=0.5)])
    optimizer = optimizer or build()
    manager.track(optimizer=optimizer)
    first, own = optimizer.param_groups
    created = extras(model)
    assert [id(value) for value in own["params"]] == [id(value) for value in created]
    assert len(first["params"]) == 4
    assert not {id(value) for value in first["params"]} & {id(value) for value in created}
    assert (own["name"], own["lr"], own["weight_decay"]) == ("creator", 0.25, 0.0)
    assert own["betas"] == (0.7, 0.8)
    assert "name" not in first
    assert first["weight_decay"] == 0.25
    if named:
        assert own["param_names"] == ["extra_0", "extra_1"]
        assert len(first["param_names"]) == 4
    manager.on_train_begin()
    step(manager, optimizer, 0)
    assert all(value.item() != 1.0 for value in created)


def test_tracking_again_changes_nothing() -> None:
    model = toys.mlp()
    manager = prepare_compression(model, [creator()])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager.track(optimizer=optimizer)
    before = memberships(optimizer)
    manager.track(optimizer=optimizer, dataloader=[1])
    assert memberships(optimizer) == before


def test_weight_decay_is_an_option_and_absent_where_the_optimizer_knows_none() -> None:
    model = toys.mlp()
    manager = prepare_compression(model, [creator(weight_decay=0.125)])
    optimizer = torch.optim.Rprop(model.parameters(), 0.1)
    manager.track(optimizer=optimizer)
    assert "weight_decay" not in optimizer.param_groups[1]
    manager.track(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert manager._context.tracked["optimizer"].param_groups[1]["weight_decay"] == 0.125


def test_a_group_of_the_users_own_stays_as_it_is() -> None:
    model = toys.mlp()
    manager = prepare_compression(model, [creator(learning_rate_factor=9.0)])
    others = [value for name, value in model.named_parameters() if not name.startswith("extra")]
    optimizer = torch.optim.SGD([{"params": others}, {"params": extras(model), "lr": 0.01}], 0.1)
    before = memberships(optimizer)
    manager.track(optimizer=optimizer)
    manager.on_train_begin()
    step(manager, optimizer, 0)
    assert memberships(optimizer) == before
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    manager.close()
    assert memberships(optimizer) == [before[0], []]


def test_a_group_of_the_users_that_lacks_a_parameter_is_replaced_by_one_of_all() -> None:
    model = toys.mlp()
    manager = prepare_compression(model, [creator()])
    others = [value for name, value in model.named_parameters() if not name.startswith("extra")]
    first, second = extras(model)
    optimizer = torch.optim.SGD([{"params": others}, {"params": [first]}], 0.1)
    manager.track(optimizer=optimizer)
    assert memberships(optimizer)[1:] == [[], [id(first), id(second)]]


def test_a_rate_that_is_a_tensor_is_changed_in_place() -> None:
    model = toys.mlp()
    optimizer = torch.optim.Adam(model.parameters(), torch.tensor(0.5))
    manager = prepare_compression(model, [creator(learning_rate_factor=0.5)])
    manager.track(optimizer=optimizer)
    first, own = (group["lr"] for group in optimizer.param_groups)
    manager.on_train_begin()
    first.fill_(0.25)
    step(manager, optimizer, 0)
    assert optimizer.param_groups[1]["lr"] is own  # captured graphs read this very tensor
    assert own.item() == 0.125


def test_another_optimizer_under_the_same_name_takes_over() -> None:
    model = toys.mlp()
    first = torch.optim.SGD(model.parameters(), 0.1)
    second = torch.optim.SGD(model.parameters(), 0.1)
    manager = prepare_compression(model, [creator()])
    manager.track(optimizer=first)
    manager.track(optimizer=second)
    assert [len(group["params"]) for group in first.param_groups] == [4]
    assert [len(group["params"]) for group in second.param_groups] == [4, 2]


def test_of_several_optimizers_the_one_that_has_them_or_the_one_named_optimizer() -> None:
    for build_first in (True, False):
        model = toys.mlp()
        build = functools.partial(torch.optim.SGD, list(model[2].parameters()), 0.1)
        usual = build() if build_first else None
        manager = prepare_compression(model, [creator()])
        usual = usual or build()
        values = [*model[0].parameters(), *([] if build_first else extras(model))]
        other = torch.optim.SGD(values, 0.1)
        manager.track(a=other, optimizer=usual)
        with_group, without = (usual, other) if build_first else (other, usual)
        assert [len(group["params"]) for group in with_group.param_groups] == [2, 2]
        assert [len(group["params"]) for group in without.param_groups] == [2]


def test_parameters_created_late_join_the_optimizer_of_that_name_though_others_came_first() -> None:
    model = toys.mlp()
    manager = prepare_compression(model, [probe()])
    other, usual = (torch.optim.SGD(model.parameters(), 0.1) for _ in range(2))
    manager.track(other=other)
    manager.track(optimizer=usual)
    manager._context.add_parameters({"late": nn.Parameter(torch.ones(()))}, owner="probe")
    assert [len(item.param_groups) for item in (other, usual)] == [1, 2]


@pytest.mark.parametrize("late", [False, True])
def test_unfit_optimizers_are_refused_and_passed_over(late: bool) -> None:
    model = toys.mlp()
    matrices = [value for value in model.parameters() if value.dim() == 2]
    optimizers = [torch.optim.LBFGS(model.parameters()), torch.optim.Muon(matrices)]
    for optimizer in optimizers:
        manager = prepare_compression(toys.mlp(), [creator()])
        with pytest.raises(ConfigError, match=f"{type(optimizer).__name__} cannot update.*'creat"):
            manager.track(optimizer=optimizer, ema=toys.mlp())
        assert len(manager._context.tracked) == 0
        assert len(optimizer.param_groups) == 1
    manager = prepare_compression(model, [creator()])
    fit = torch.optim.SGD(model.parameters(), 0.1)
    manager.track(optimizer=optimizers[1], biases=fit)
    assert len(fit.param_groups) == 2
    assert len(optimizers[1].param_groups) == 1


def test_a_step_without_optimizer_is_refused() -> None:
    manager = prepare_compression(toys.mlp(), [creator()])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    with pytest.raises(LifecycleError, match=r"'creator' created 2 parameters.*'extra_0'.*track"):
        manager.on_step_begin(0)
    optimizer = torch.optim.SGD(manager.model.parameters(), 0.1)
    manager.track(optimizer=optimizer)
    step(manager, optimizer, 0)


def test_parameters_created_in_a_step_join_at_once_or_are_refused() -> None:
    def on_after_compute_loss(self: Any, context: Any) -> None:
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.ones(()))
            context.add_parameters({"late": self.late}, owner=self.name)

    for tracked in (True, False):
        plugin = probe(on_after_compute_loss=on_after_compute_loss)
        manager = prepare_compression(toys.mlp(), [plugin])
        optimizer = torch.optim.SGD(manager.model.parameters(), 0.1)
        if tracked:
            manager.track(optimizer=optimizer)
        begin_step(manager)
        call_loss(manager)
        if tracked:
            assert optimizer.param_groups[1]["params"][0] is plugin.late
            manager.on_before_optimizer_step()
        else:
            with pytest.raises(LifecycleError, match="no optimizer"):
                manager.on_before_optimizer_step()


def test_named_groups_are_published_by_name() -> None:
    model = toys.mlp()
    manager = prepare_compression(model, [creator(learning_rate_factor=0.5)])
    manager.track(optimizer=torch.optim.SGD(model.parameters(), 0.5))
    rates = manager._context.tracked.learning_rates()
    assert rates == {"learning_rate": 0.5, "learning_rate/creator": 0.25}


def test_what_was_taken_away_may_be_taken_away_again() -> None:
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager = prepare_compression(model, [creator()])
    manager.track(optimizer=optimizer)
    before = memberships(optimizer)
    extra = {"extra": nn.Parameter(torch.ones(()))}
    take_away = manager._context.add_parameters(extra, owner="other")
    assert len(memberships(optimizer)) == len(before) + 1
    take_away()
    take_away()
    assert memberships(optimizer) == before
    manager.close()


# Close and resume --------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_close_takes_group_parameters_and_state_away(named: bool) -> None:
    model = toys.mlp()
    values = list(model.named_parameters() if named else model.parameters())
    optimizer = torch.optim.Adam(values, 0.1)
    before = memberships(optimizer)
    manager = prepare_compression(model, [creator()])
    manager.track(optimizer=optimizer)
    manager.on_train_begin()
    run_step(manager, 0)
    step(manager, optimizer, 1)
    assert len(optimizer.state) == 6
    # What the user adds meanwhile stays.
    own = nn.Parameter(torch.ones(()))
    optimizer.add_param_group({"params": [("own", own)] if named else [own]})
    manager.close()
    assert memberships(optimizer) == [*before, [id(own)]]
    assert len(optimizer.state) == 4


def _train(epochs: int, state: Any = None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = toys.mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    scheduler = lr.OneCycleLR(optimizer, 0.1, total_steps=8)
    manager = prepare_compression(model, [creator(learning_rate_factor=0.5)])
    manager.track(optimizer=optimizer, scheduler=scheduler)
    if state is not None:
        manager.load_state_dict(state)
    manager.on_train_begin()
    for epoch in range(manager.position.epoch, epochs):
        manager.on_epoch_begin(epoch)
        step(manager, optimizer, 0, scheduler)
        manager.on_epoch_end()
    return manager, optimizer


def test_resumed_groups_continue_to_the_last_bit() -> None:
    whole, _ = _train(6)
    first, _ = _train(2)
    state = copy.deepcopy(first.state_dict())
    assert state["tracked"]["optimizer"]["param_groups"][1]["name"] == "creator"
    # The groups are new objects after loading, and the rates still follow.
    second, optimizer = _train(6, state)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[1] == 0.5 * rates[0]
    toys.assert_identical(_comparable(second), _comparable(whole))
    second.close()
    assert len(optimizer.param_groups) == 1


def _comparable(manager: Any) -> Any:
    state = manager.state_dict()
    del state["loader"], state["random"]
    return state
