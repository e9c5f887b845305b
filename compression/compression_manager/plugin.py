"""What every plugin derives from: a config dataclass and a `Plugin` class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import pluggy

from compression_manager.errors import CheckpointMismatchError, ConfigError

PROJECT_NAME = "compression_manager"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


def option(help: str, *, runtime: bool = False) -> dict[str, Any]:
    """Return the `metadata` of a config field.

    Args:
        help: one line for users; the reference and the command line show it.
        runtime: the value is a live object (a model, a callable), which recipes cannot hold;
            it is passed by name to `prepare_compression`.
    """
    return {"help": help, "runtime": runtime}


@dataclass(frozen=True)
class PluginConfig:
    """Base of every plugin's options: a frozen dataclass checked in `__post_init__`.

    Subclasses set `plugin` to the name under which the plugin is registered in the
    entry-point group `compression_manager.plugins.v1`.
    """

    plugin: ClassVar[str]

    enabled: bool = field(
        default=True,
        kw_only=True,
        metadata=option("Whether the plugin takes part; false is as if it were not listed."),
    )
    name: str | None = field(
        default=None,
        kw_only=True,
        metadata=option(
            "Name of the instance, or null: the plugin's, numbered where it is listed again."
        ),
    )


ConfigType = TypeVar("ConfigType", bound=PluginConfig)


class Plugin(Generic[ConfigType]):
    """Base of every plugin: options in, hook implementations and state out.

    A subclass sets `config_class` and marks its hook methods with `@hookimpl`; a method may
    declare any subset of the hook's parameters, by name and without defaults.

    Attributes:
        config_class: the options dataclass.
        roles: what only one plugin may own in a composition, for example
            `frozenset({"fake_quant"})`; two owners of one role are refused at prepare.
        default_providers: service hook -> plugin name that answers it when no listed plugin
            does, so that a short list of configs is complete.
        provider_options: plugin name -> options of its config where it is taken as a default
            provider; the provider's own defaults apply to the rest.
        name: the instance name, unique within a manager.
        config: the options of this instance.
    """

    config_class: ClassVar[type[PluginConfig]]
    roles: ClassVar[frozenset[str]] = frozenset()
    default_providers: ClassVar[Mapping[str, str]] = {}
    provider_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, config: ConfigType) -> None:
        if not isinstance(config, self.config_class):
            raise ConfigError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, "
                f"got {type(config).__name__}."
            )
        self.config = config
        self.name: str = config.name or config.plugin

    def required_hooks(self) -> frozenset[str]:
        """Return the optional hooks (`on_epoch_begin`, `on_after_optimizer_step`,
        `on_before_eval`, `on_after_eval`) that this instance cannot do without.
        """
        return frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart and is not a tensor of the model.

        Values are numbers, strings, None, tensors, and lists, tuples and dicts of these.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointMismatchError: the plugin keeps no state but was given some.
        """
        if state:
            raise CheckpointMismatchError(
                f"plugin '{self.name}' keeps no state, but the checkpoint holds "
                f"{', '.join(sorted(state))} for it."
            )
