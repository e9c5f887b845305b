"""Training: it works, repeats itself, and does not depend on who else is listed where."""

from __future__ import annotations

import pytest

from compression_manager.errors import LifecycleError
from compression_manager.plugin_host.composition import PluginSpec
from compression_manager.plugin_host.loading import required_hooks
from compression_manager.state import capture_random_state
from compression_manager.testing.comparison import differences
from compression_manager.testing.contract.base import ContractRuns, require, require_none
from compression_manager.testing.loops import train_without_optional_hooks
from compression_manager.testing.recording import RecordingPlugin


class TrainingContract(ContractRuns):
    """Tests of a training that nobody interrupts."""

    def test_trains(self) -> None:
        """A few steps change the model."""
        run = self._start()
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train()
        after = {name: p.detach() for name, p in run.model.named_parameters()}
        require(
            differences(after, before),
            "no parameter of the model changed in training; the plugin probably cuts the loss "
            "from the graph, freezes the model or clears its gradients.",
        )

    def test_prepare_draws_no_random_numbers(self) -> None:
        """Listing the plugin does not change what the rest of the program draws."""
        parts = self._build("run")
        before = capture_random_state()
        run = self._prepare(parts)
        require_none(
            differences(capture_random_state(), before, "random state"),
            "preparing moved the global random generators, so that data and dropout are others "
            "than without the plugin; draw from a torch.Generator of the plugin's own, or put "
            "the state back (compression_manager.models.calling.quiet_evaluation):",
        )
        run.manager.close()

    def test_two_trainings_are_equal_bit_for_bit(self) -> None:
        """The same seeds give the same training."""
        first = self._start("first").train().result()
        second = self._start("second").train().result()
        require_none(
            differences(second, first),
            "two trainings from the same seeds differ; look for state kept on the class or the "
            "module, for time, hash order or generators that are not seeded:",
        )

    def test_order_makes_no_difference(self) -> None:
        """Another plugin that only looks on, listed before or behind, changes nothing."""
        alone = self._start("alone").train().result()
        alone["plugins"]["recording"] = {}
        for place in ("before", "behind"):
            parts = self._build(place)
            listed: list[PluginSpec] = [*parts.configs]
            listed.insert(0 if place == "before" else len(listed), RecordingPlugin())
            beside = self._prepare(parts, listed).train().result()
            require_none(
                differences(beside, alone),
                f"training differs when a plugin that changes nothing is listed {place} this "
                "one; do not rely on the place in the list:",
            )

    def test_optional_hooks_can_be_left_out(self) -> None:
        """A loop with the required hooks only, and two losses for each update, works."""
        run = self._start()
        required = required_hooks([self._plugin_class(c)(c) for c in run.parts.configs])
        parts = run.parts
        arguments = (run.manager, parts.batches, parts.optimizer)
        if required:
            with pytest.raises(LifecycleError):
                train_without_optional_hooks(*arguments, loss_arguments=self.loss_arguments)
            return
        try:
            train_without_optional_hooks(*arguments, loss_arguments=self.loss_arguments)
        except Exception as error:
            raise AssertionError(
                f"a loop without the optional hooks fails: {error}\nReturn from required_hooks() "
                "those that the plugin cannot do without, so that a loop is told what it lacks; "
                "and expect several losses before one optimizer step."
            ) from error
