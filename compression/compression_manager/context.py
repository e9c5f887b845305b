"""What hooks receive: the model, the position in training, and the manager's services."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from compression_manager.cleanup import Cleanup
from compression_manager.errors import ConfigError, LifecycleError
from compression_manager.metrics import MetricBoard
from compression_manager.models.hooks import ModelHooks
from compression_manager.tracking.parameter_groups import ParameterGroup, ParameterGroups
from compression_manager.tracking.tracked import Tracked

if TYPE_CHECKING:
    from compression_manager.services import Services


class Context:
    """One object per manager, handed to every hook.

    Attributes:
        model: the user's model, shaped in place.
        example_inputs: what the user gave to `prepare_compression`, or None.
        recipe: the whole configuration as plain numbers, strings, lists and dicts.
        metrics: where plugins publish numbers and pictures.
        tracked: the optimizer and everything else the user registered with `track`.
        parameter_groups: what plugins gave to `add_parameters`.
        model_hooks: forward hooks that close and conversion remove.
        epoch: present epoch, from 0.
        step: batches begun in this epoch.
        remembered_input: example inputs, or the first input of a loss call, or None.
        step_cache: plugins share results of one loss call here; emptied after each call.
        skipped_layers: layer name -> why it is not quantized; shown by `manager.report()`.
        folded_layers: layer name -> name of the layer that does its work after conversion.
        notes: plugin -> what `manager.report()` says about it.
        should_stop: whether a plugin asked to stop, and `stop_reason` says why.
        details_requested: whether `publish_details` runs at the end of this step.
    """

    def __init__(
        self, model: nn.Module, *, example_inputs: Any = None, recipe: Mapping[str, Any]
    ) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.recipe = recipe
        self.metrics = MetricBoard()
        self.tracked = Tracked()
        self.parameter_groups = ParameterGroups(self.tracked)
        self.model_hooks = ModelHooks()
        self.epoch = 0
        self.step = 0
        self.step_cache: dict[Any, Any] = {}
        self.skipped_layers: dict[str, str] = {}
        self.folded_layers: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.should_stop = False
        self.stop_reason: str | None = None
        self.details_requested = False
        self.remembered_input = example_inputs
        self._cleanup = Cleanup()
        self._task_weight: tuple[str, float] | None = None
        self._collect_state: Callable[[], dict[str, Any]] | None = None
        self._services: Services | None = None
        self.add_cleanup(self.model_hooks.remove_all, owner="compression_manager")

    @property
    def global_step(self) -> int:
        """Optimizer steps completed since training first began."""
        return self.metrics.global_step

    @global_step.setter
    def global_step(self, value: int) -> None:
        self.metrics.global_step = value

    def remember_input(self, input: Any) -> None:
        """Keep the first input that is seen, for the parity check and the report."""
        if self.remembered_input is None:
            self.remembered_input = input

    def connect(self, services: Services, collect_state: Callable[[], dict[str, Any]]) -> None:
        """Give access to what the manager offers; the manager calls it once."""
        self._services = services
        self._collect_state = collect_state

    # Undoing ---------------------------------------------------------------------------------

    def add_cleanup(self, callback: Callable[[], object], *, owner: str) -> None:
        """Run `callback` when the manager closes or preparation fails, last added first."""
        self._cleanup.add(callback, owner)

    def run_cleanup(self) -> list[BaseException]:
        """Run every callback once and return what they raised."""
        return self._cleanup.run()

    # Training --------------------------------------------------------------------------------

    def add_parameters(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        owner: str,
        learning_rate_factor: float = 1.0,
        weight_decay: float = 0.0,
    ) -> Callable[[], None]:
        """Have parameters that a plugin created trained by the tracked optimizer.

        They become a group of their own with the options of the optimizer's first group, named
        `group["name"] = owner`, until the manager closes. Parameters of modules inside the model
        are part of its state; others the plugin saves itself. A training step without a tracked
        optimizer raises LifecycleError from then on.

        Args:
            parameters: name -> Parameter, at least one; names are those of error messages.
            owner: name of the plugin.
            learning_rate_factor: the group's learning rate, as a factor of the first group's.
            weight_decay: of the group; the first group's is not taken over.

        Returns:
            What takes them away again before the manager closes.

        Raises:
            ConfigError: the tracked optimizer cannot take them.
        """
        group = ParameterGroup(owner, dict(parameters), learning_rate_factor, weight_decay)
        take_away = self.parameter_groups.add(group)
        self.add_cleanup(take_away, owner=owner)
        return take_away

    # Loss ------------------------------------------------------------------------------------

    @property
    def task_weight(self) -> float:
        """Factor of the task's own loss term; 1 unless a plugin set it."""
        return 1.0 if self._task_weight is None else self._task_weight[1]

    def set_task_weight(self, owner: str, weight: float) -> None:
        """Rescale the task's own loss term.

        Raises:
            ConfigError: another plugin set a different weight.
        """
        if self._task_weight is not None and self._task_weight[1] != weight:
            other, value = self._task_weight
            raise ConfigError(
                f"plugins disagree about the weight of the task's own loss: '{other}' sets "
                f"{value}, '{owner}' sets {weight}. Give both the same first loss_weights entry."
            )
        self._task_weight = (owner, weight)

    # Requests --------------------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        """Ask the training loop to end after this epoch; `manager.should_stop` turns true."""
        self.should_stop = True
        self.stop_reason = reason

    def note(self, owner: str, text: str) -> None:
        """Have `manager.report()` say `text` about the plugin `owner`; replaces its last note."""
        self.notes[owner] = text

    def request_details(self) -> None:
        """Have every plugin publish its costly metrics at the end of the present step."""
        self.details_requested = True

    def collect_state(self) -> dict[str, Any]:
        """Return the whole training state: model, plugins, tracked objects, random state.

        Checkpoint plugins write it; `manager.load_state_dict` takes it back.
        """
        if self._collect_state is None:
            raise LifecycleError("the training state is available once a manager exists.")
        return self._collect_state()

    # Services --------------------------------------------------------------------------------

    @property
    def services(self) -> Services:
        """Questions to other plugins: `make_observer`, `make_fake_quantizer`,
        `make_distillation_loss`.
        """
        if self._services is None:
            raise LifecycleError("services answer once a manager exists.")
        return self._services
