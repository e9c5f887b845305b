"""Parameters that plugins create join the tracked optimizer as groups of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compression_manager.errors import ConfigError, LifecycleError
from compression_manager.tracking.scheduler_groups import append_group, check_known, remove_group
from compression_manager.tracking.tracked import Tracked

# LBFGS has a single group; Muon updates matrices only.
_UNFIT = (torch.optim.LBFGS, torch.optim.Muon)
# What belongs to the first group itself and not to how it is updated.
_OWN_KEYS = frozenset({"params", "param_names", "name"})


@dataclass(eq=False)
class ParameterGroup:
    """Parameters of one plugin.

    Attributes:
        owner: name of the plugin; the optimizer's group has it as `group["name"]`.
        parameters: name -> Parameter.
        learning_rate_factor: the group's learning rate is this times that of the optimizer's
            first group, at every step and whatever scheduler moves it.
        weight_decay: of the group, where the optimizer knows one.
        optimizer: where the parameters are now, or None.
        is_the_users: the user gave them a group without anything else, which stays as it is.
    """

    owner: str
    parameters: Mapping[str, nn.Parameter]
    learning_rate_factor: float = 1.0
    weight_decay: float = 0.0
    optimizer: Optimizer | None = None
    is_the_users: bool = False

    def holds(self, value: object) -> bool:
        """Return whether `value` is one of the parameters."""
        return any(value is parameter for parameter in self.parameters.values())


class ParameterGroups:
    """The groups of all plugins of one manager, and the optimizers that they joined.

    Args:
        tracked: what the user registered.
    """

    def __init__(self, tracked: Tracked) -> None:
        self._tracked = tracked
        self._groups: list[ParameterGroup] = []

    def add(self, group: ParameterGroup) -> Callable[[], None]:
        """Have `group` join the tracked optimizer, now or when one is tracked.

        Returns:
            What takes it away again; a second call does nothing.

        Raises:
            ConfigError: the tracked optimizer cannot take it.
        """
        optimizer = _optimizer_for(group, self._tracked)
        if optimizer is not None:
            check_known(optimizer, self._tracked.values())
            _join(group, optimizer, self._tracked)
        self._groups.append(group)

        def take_away() -> None:
            if group in self._groups:
                self._groups.remove(group)
                _leave(group, self._tracked)

        return take_away

    def track(self, objects: Mapping[str, Any]) -> None:
        """Register `objects`, and let all groups join the optimizer that is tracked then.

        All of it, or nothing if it cannot be.

        Raises:
            ConfigError: an object is unfit, or the optimizer cannot take a group.
        """
        after = Tracked()
        after.register({**self._tracked, **objects})
        moves = [
            (group, optimizer)
            for group in self._groups
            if (optimizer := _optimizer_for(group, after)) is not group.optimizer
        ]
        for _, optimizer in moves:
            if optimizer is not None:
                check_known(optimizer, after.values())
        for group, _ in moves:
            _leave(group, self._tracked)
        self._tracked.register(objects)
        for group, optimizer in moves:
            if optimizer is not None:
                _join(group, optimizer, self._tracked)

    def check_joined(self) -> None:
        """Raise LifecycleError if there are parameters that no optimizer trains."""
        for group in self._groups:
            if group.optimizer is None:
                raise LifecycleError(
                    f"plugin '{group.owner}' created {len(group.parameters)} parameters that have "
                    f"to be trained (such as '{next(iter(group.parameters))}'), but no optimizer "
                    "is tracked; call manager.track(optimizer=optimizer) before the first step."
                )

    def follow_rates(self) -> None:
        """Set each group's learning rate from the present one of its optimizer's first group."""
        for group in self._groups:
            if group.optimizer is None or group.is_the_users:
                continue
            options = group.optimizer.param_groups[_index(group, group.optimizer)]
            rate = group.optimizer.param_groups[0]["lr"] * group.learning_rate_factor
            if isinstance(options["lr"], Tensor):
                options["lr"].copy_(rate)  # captured graphs read this very tensor
            else:
                options["lr"] = rate


def _optimizer_for(group: ParameterGroup, tracked: Tracked) -> Optimizer | None:
    """Return the optimizer that has the parameters already, or else the first that can.

    Raises:
        ConfigError: that optimizer cannot update them.
    """
    optimizers = sorted(tracked.optimizers.items(), key=lambda item: item[0] != "optimizer")
    if not optimizers:
        return None
    candidates = [value for _, value in optimizers if _places(group, value)]
    candidates = candidates or [value for _, value in optimizers]
    for optimizer in candidates:
        if not isinstance(optimizer, _UNFIT):
            return optimizer
    raise ConfigError(
        f"{type(candidates[0]).__name__} cannot update the parameters that plugin '{group.owner}' "
        "created, which are a group of their own and no matrices; track an optimizer that can, "
        "such as AdamW or SGD."
    )


def _places(group: ParameterGroup, optimizer: Optimizer) -> list[tuple[int, int]]:
    """Return where `optimizer` has parameters of `group`: (group, position in it), from behind."""
    return [
        (index, position)
        for index, options in reversed(list(enumerate(optimizer.param_groups)))
        for position, value in reversed(list(enumerate(options["params"])))
        if group.holds(value)
    ]


def _index(group: ParameterGroup, optimizer: Optimizer) -> int:
    """Return the index of the optimizer's group that holds them; loading a state replaces it."""
    return _places(group, optimizer)[0][0]


def _join(group: ParameterGroup, optimizer: Optimizer, tracked: Tracked) -> None:
    group.optimizer = optimizer
    first = optimizer.param_groups[0]
    group.is_the_users = any(
        len(options["params"]) == len(group.parameters) and all(map(group.holds, options["params"]))
        for options in optimizer.param_groups
    )
    if group.is_the_users:
        return
    _remove_parameters(group, optimizer)
    options = {key: _copied(value) for key, value in first.items() if key not in _OWN_KEYS}
    options["lr"] = options["lr"] * group.learning_rate_factor
    if "weight_decay" in options:
        options["weight_decay"] = group.weight_decay
    named = "param_names" in first
    options["params"] = list(group.parameters.items() if named else group.parameters.values())
    options["name"] = group.owner
    optimizer.add_param_group(options)
    append_group(optimizer, tracked.values())


def _leave(group: ParameterGroup, tracked: Tracked) -> None:
    """Take the parameters, their group and their state out of the optimizer that has them."""
    optimizer, group.optimizer = group.optimizer, None
    if optimizer is None:
        return
    places = _places(group, optimizer)
    _remove_parameters(group, optimizer)
    for parameter in group.parameters.values():
        optimizer.state.pop(parameter, None)
    if not group.is_the_users and places:
        index = places[0][0]
        del optimizer.param_groups[index]
        remove_group(optimizer, index, tracked.values())


def _remove_parameters(group: ParameterGroup, optimizer: Optimizer) -> None:
    for index, position in _places(group, optimizer):
        options = optimizer.param_groups[index]
        del options["params"][position]
        if "param_names" in options:
            del options["param_names"][position]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
