"""Schedules count optimizer steps: with accumulation, and with or without the after hook."""

from __future__ import annotations

from typing import Any

import pytest

import toys
from compression_manager import prepare_compression
from probes import call_loss, probe


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_updates_are_counted_not_losses(after: bool, every: int) -> None:
    seen: dict[str, list[int]] = {}

    def seeing(hook: str) -> Any:
        def see(self: Any, context: Any) -> None:
            seen.setdefault(hook, []).append(context.global_step)

        return see

    hooks = ["on_step_begin", "on_before_optimizer_step", "on_after_optimizer_step", "on_step_end"]
    manager = prepare_compression(toys.mlp(), [probe(**{hook: seeing(hook) for hook in hooks})])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for step in range(6):
        manager.on_step_begin(step)
        call_loss(manager)
        if (step + 1) % every == 0:
            manager.on_before_optimizer_step()
            if after:
                manager.on_after_optimizer_step()
        manager.on_step_end()
        assert manager.position.step == step + 1
        assert manager.position.global_step == (step + 1) // every
    begun = [step // every for step in range(6)]
    ended = [(step + 1) // every for step in range(6)]
    updates = list(range(6 // every))
    assert seen["on_step_begin"] == begun
    assert seen["on_step_end"] == ended
    assert seen["on_before_optimizer_step"] == updates
    assert seen.get("on_after_optimizer_step", []) == [n + 1 for n in updates] * after


@pytest.mark.parametrize("after", [True, False])
def test_several_updates_in_one_step(after: bool) -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    manager.on_train_begin()
    manager.on_step_begin(0)
    for count in range(1, 4):
        call_loss(manager)
        manager.on_before_optimizer_step()
        if after:
            manager.on_after_optimizer_step()
        assert manager.position.global_step == count
    manager.on_step_end()
    assert manager.position.global_step == 3


def test_it_goes_on_across_epochs_and_trainings() -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    for epoch in range(3):
        manager.on_train_begin()
        manager.on_epoch_begin(epoch)
        manager.on_step_begin(0)
        call_loss(manager)
        manager.on_before_optimizer_step()
        manager.on_step_end()
        manager.on_epoch_end()
        manager.on_train_end()
        assert manager.position == type(manager.position)(epoch + 1, 0, epoch + 1)
