"""Objects with state that the user registers: optimizer, scheduler, scaler, dataloader, others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from compression_manager.errors import ConfigError


class Tracked(Mapping[str, Any]):
    """Name -> object, in the order of registration."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}

    def register(self, objects: Mapping[str, Any]) -> None:
        """Add or replace objects; all of them, or none if one is unfit.

        Raises:
            ConfigError: an object is unfit, see `check`.
        """
        self.check(objects)
        self._objects.update(objects)

    def warn_of_lost(self, replaced: Mapping[str, Optimizer], model: nn.Module) -> None:
        """Warn of optimizers that were replaced by some without their parameters.

        Args:
            replaced: by their names; parameters that neither the model nor a tracked module has
                any more are not missed.
            model: the model that is trained.
        """
        used = {id(item) for part in (model, *self.modules.values()) for item in part.parameters()}
        used -= {id(item) for other in self.optimizers.values() for item in _parameters(other)}
        for name, optimizer in replaced.items():
            lost = sum(item.requires_grad and id(item) in used for item in _parameters(optimizer))
            if lost:
                warnings.warn(
                    f"track({name}=...) replaces the {type(optimizer).__name__} of this name, "
                    f"of which {lost} parameters are in no tracked optimizer now: checkpoints lack "
                    "their state. Track several by names of their own: "
                    f"manager.track({name}=first, another_{name}=second).",
                    stacklevel=3,
                )

    @staticmethod
    def check(objects: Mapping[str, Any]) -> None:
        """Refuse objects that cannot be saved and restored; a dataloader need only be iterable.

        Raises:
            ConfigError: names the first one and what it lacks.
        """
        for name, value in objects.items():
            if isinstance(value, type):
                raise ConfigError(
                    f"track({name}=...) got the class {value.__name__}; pass an instance."
                )
            if isinstance(value, nn.Module) and name in {"optimizer", "scheduler", "scaler"}:
                raise ConfigError(f"track({name}=...) got a module ({type(value).__name__}).")
            if name == "dataloader" and not is_iterable(value):
                raise ConfigError(
                    f"track(dataloader=...) takes an iterable of batches, got "
                    f"{type(value).__name__}."
                )
            if name != "dataloader" and not is_stateful(value):
                raise ConfigError(
                    f"track({name}=...) takes objects with state_dict() and load_state_dict(); "
                    f"{type(value).__name__} lacks them."
                )

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The tracked torch optimizers by name."""
        return {k: v for k, v in self._objects.items() if isinstance(v, Optimizer)}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The tracked modules by name, such as a head whose weights belong to the loss."""
        return {k: v for k, v in self._objects.items() if isinstance(v, nn.Module)}

    def hold_nothing_of(self, model: nn.Module) -> bool:
        """Return whether there are optimizers, and none has a parameter of `model`."""
        trained = {id(item) for item in model.parameters() if item.requires_grad}
        groups = [group for value in self.optimizers.values() for group in value.param_groups]
        parameters = (id(item) for value in self.optimizers.values() for item in _parameters(value))
        return bool(trained and groups) and trained.isdisjoint(parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return name -> state of every tracked object that keeps state."""
        return {k: v.state_dict() for k, v in self._objects.items() if is_stateful(v)}

    def describe(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return name -> what the state of each object does not say, as plain values.

        That is its class, and of an optimizer the names of its options and those of the parameters
        in each group; "" for one that is none of the model's.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found: dict[str, dict[str, Any]] = {}
        for key, value in self._objects.items():
            if is_stateful(value):
                is_optimizer = isinstance(value, Optimizer)
                groups = value.param_groups if is_optimizer else []
                found[key] = {
                    "class": f"{type(value).__module__}.{type(value).__qualname__}",
                    # Those of the class: schedulers put more into the groups. What wraps another
                    # optimizer may have none.
                    "options": sorted(getattr(value, "defaults", {})) if is_optimizer else [],
                    "parameters": [
                        [names.get(id(parameter), "") for parameter in group["params"]]
                        for group in groups
                    ],
                }
        return found

    def learning_rates(self) -> dict[str, float]:
        """Return metric name -> present learning rate of every parameter group.

        A group with a name (`group["name"]`) is shown by it, one without a rate not at all.
        """
        rates: dict[str, float] = {}
        optimizers = self.optimizers
        several = len(optimizers) > 1
        for name, optimizer in optimizers.items():
            base = f"learning_rate/{name}" if several else "learning_rate"
            unnamed = sum("name" not in group for group in optimizer.param_groups)
            for index, group in enumerate(optimizer.param_groups):
                if "lr" not in group:
                    continue
                key = f"{base}/{group.get('name', f'group_{index}')}"
                rates[base if unnamed == 1 and "name" not in group else key] = float(group["lr"])
        return rates

    def __getitem__(self, name: str) -> Any:
        return self._objects[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)

    def __len__(self) -> int:
        return len(self._objects)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def is_stateful(value: object) -> bool:
    """Return whether `value` can save and restore itself."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def is_iterable(value: object) -> bool:
    """Return whether a `for` loop can go through `value`."""
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")
