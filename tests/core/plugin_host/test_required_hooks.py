"""Optional hooks that an installed plugin cannot do without: the first miss is an error."""

from __future__ import annotations

import pytest

import toys
from compression_manager import CompressionManager, LifecycleError, PluginError, prepare_compression
from compression_manager.plugin import PluginConfig
from compression_manager.training.schedule import StartAt
from compression_plugins import CheckpointConfig, QATConfig
from probes import call_loss, probe, run_step


def _requiring(*hooks: str) -> CompressionManager:
    needy = probe("needy", required_hooks=lambda self: frozenset(hooks))
    return prepare_compression(toys.mlp(), [probe("other"), needy])


def _at_first_update(hook: str | None) -> CompressionManager:
    manager = _requiring(hook) if hook else prepare_compression(toys.mlp(), [probe()])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    manager.on_step_begin(0)
    call_loss(manager)
    manager.on_before_optimizer_step()
    return manager


def test_missing_after_optimizer_step_is_named_at_the_end_of_the_step() -> None:
    manager = _at_first_update("on_after_optimizer_step")
    text = "plugin 'needy' needs on_after_optimizer_step; call it after optimizer.step()"
    with pytest.raises(LifecycleError) as error:
        manager.on_step_end()
    assert text in str(error.value)
    manager.on_after_optimizer_step()
    manager.on_step_end()


def test_missing_after_optimizer_step_is_named_where_the_state_is_saved() -> None:
    manager = _at_first_update("on_after_optimizer_step")
    with pytest.raises(LifecycleError, match="'needy' needs on_after_optimizer_step"):
        manager.state_dict()
    manager.on_after_optimizer_step()
    with pytest.warns(UserWarning, match="saved after 1 batches"):  # of a plain loop
        assert manager.state_dict()["global_step"] == 1


def test_missing_after_optimizer_step_is_named_at_the_next_update() -> None:
    manager = _at_first_update("on_after_optimizer_step")
    call_loss(manager)
    with pytest.raises(LifecycleError, match="'needy' needs on_after_optimizer_step"):
        manager.on_before_optimizer_step()


def test_after_optimizer_step_is_optional_otherwise() -> None:
    _at_first_update(None).on_step_end()


@pytest.mark.parametrize("hook", ["on_before_eval", "on_after_eval"])
def test_missing_evaluation_is_named_at_the_first_epoch_end(hook: str) -> None:
    manager = _requiring(hook)
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    run_step(manager, 0)
    with pytest.raises(LifecycleError, match=f"'needy' needs {hook} in every epoch"):
        manager.on_epoch_end()
    manager.on_before_eval()
    manager.on_after_eval({})
    manager.on_epoch_end()
    manager.on_epoch_begin(1)
    run_step(manager, 0)
    with pytest.raises(LifecycleError, match=f"'needy' needs {hook} in every epoch"):
        manager.on_epoch_end()


def test_missing_evaluation_of_a_loop_without_epochs_is_named_at_its_end() -> None:
    manager = _requiring("on_after_eval")
    manager.on_train_begin()
    run_step(manager, 0)
    with pytest.raises(LifecycleError, match="'needy' needs on_after_eval at least once"):
        manager.on_train_end()
    manager.on_before_eval()
    manager.on_after_eval({})
    manager.on_train_end()


def test_evaluation_of_an_earlier_training_does_not_count() -> None:
    manager = _trained_and_evaluated()
    manager.on_train_begin()
    run_step(manager, 0)
    with pytest.raises(LifecycleError, match="'needy' needs on_after_eval at least once"):
        manager.on_train_end()


def test_steps_of_an_earlier_training_need_no_further_evaluation() -> None:
    manager = _trained_and_evaluated()
    manager.on_train_begin()
    manager.on_train_end()


def _trained_and_evaluated() -> CompressionManager:
    """Return a manager that ended a training without epochs."""
    manager = _requiring("on_after_eval")
    manager.on_train_begin()
    run_step(manager, 0)
    manager.on_before_eval()
    manager.on_after_eval({})
    manager.on_train_end()
    return manager


def test_missing_epochs_are_named_at_the_first_step() -> None:
    manager = _requiring("on_epoch_begin")
    manager.on_train_begin()
    with pytest.raises(LifecycleError, match=r"'needy' counts epochs.*on_epoch_begin"):
        manager.on_step_begin(0)
    manager.on_epoch_begin(0)
    run_step(manager, 0)


@pytest.mark.parametrize(
    ("config", "needs_epochs"),
    [
        (QATConfig(), False),
        (QATConfig(observe_at=StartAt(epoch=1), fake_quantize_at=StartAt(step=9)), True),
        (QATConfig(fake_quantize_at=StartAt(epoch=1)), True),
        (QATConfig(freeze_observers_at=StartAt(epoch=1)), True),
        (QATConfig(freeze_batch_norm_at=StartAt(epoch=1)), True),
        (CheckpointConfig("somewhere"), True),
        (CheckpointConfig("somewhere", save_every_steps=2), False),
    ],
)
def test_options_in_epochs_need_epochs(config: PluginConfig, needs_epochs: bool) -> None:
    manager = prepare_compression(toys.mlp(), [config])
    manager.on_train_begin()
    if needs_epochs:
        with pytest.raises(LifecycleError, match="counts epochs"):
            manager.on_step_begin(0)
    else:
        manager.on_step_begin(0)
    manager.close()


def test_hook_that_is_not_optional_is_refused_at_prepare() -> None:
    with pytest.raises(PluginError, match="did you mean 'on_after_optimizer_step'") as error:
        _requiring("on_after_optimiser_step")
    assert error.value.plugin == "needy"
