"""The tests that every plugin must pass."""

from __future__ import annotations

from compression_manager.testing.contract.configuration import ConfigurationContract
from compression_manager.testing.contract.conversion import ConversionContract
from compression_manager.testing.contract.failures import FailureContract
from compression_manager.testing.contract.leaving import LeavingContract
from compression_manager.testing.contract.resuming import ResumingContract
from compression_manager.testing.contract.training import TrainingContract

__all__ = ["PluginContract"]


class PluginContract(
    ConfigurationContract,
    TrainingContract,
    ResumingContract,
    FailureContract,
    LeavingContract,
    ConversionContract,
):
    """The tests that every plugin must pass; subclass it in three lines.

        class TestPruning(PluginContract):
            def make_config(self):
                return PruningConfig(sparsity=0.5)

    pytest then checks: options have help, unknown ones are refused, a recipe gives the same
    plugin; training works, twice to the same bits, in any order with another plugin, without the
    optional hooks; a training that is saved and resumed ends as the uninterrupted one; a failure
    in any hook names it; closing leaves no trace on model, optimizer and process; the converted
    model needs no plugin. Each failure says what is wrong and what to do.

    `make_config` must be overridden; `make_companions`, `make_model`, `make_batches` and
    `loss_arguments` may be. They are called anew for every run, with all random generators seeded,
    and must return new objects that are equal each time.

    Attributes:
        plugin_class: the plugin's class, where its distribution is not installed; None: the one
            that is registered under the config's name, as users find it.
        folder: an empty folder of the present run, for configs that name files.
    """
