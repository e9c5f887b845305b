"""Pruning configs of Neural Compressor, as configs of the plugin `magnitude_pruning`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from compression_manager import PluginConfig, StartAt
from compression_manager.errors import ConfigError, suggest
from compression_manager.plugin_host.discovery import installed_plugins, load_plugin_class
from compression_plugins.compat.neural_compressor import config as compat

PLUGIN = "magnitude_pruning"
_SCOPES = {"global": "global", "local": "layer"}
# What of 2.6's choices the plugin does, and how a message calls it.
_ONLY = {
    "pruning_type": ("magnitude", "weights of smallest magnitude are pruned"),
    "pattern": ("1x1", "single weights are pruned, not blocks of them"),
    "sparsity_decay_type": ("cube", "the share of zeros grows along a cubic curve"),
}


def translate_pruning(
    config: compat.WeightPruningConfig, model: nn.Module
) -> tuple[list[PluginConfig], list[str]]:
    """Return the plugin's configs, and a message for everything that has no meaning here.

    Args:
        config: of 2.6; each of its `pruning_configs` becomes a config.
        model: whose layers the names are looked for in.

    Raises:
        ConfigError: the plugin is not installed, or a value is invalid.
    """
    if PLUGIN not in installed_plugins():
        raise ConfigError(
            f"WeightPruningConfig is served by the plugin '{PLUGIN}', which is not installed; "
            "install the distribution compression-magnitude-pruning (in this project's sources: "
            "pip install ./examples/third_party_plugin), or leave the config out."
        )
    config_class = load_plugin_class(PLUGIN).config_class
    translated, notes = [], [_ignored(name) for name in config.further]
    shared = {item.name: getattr(config, item.name) for item in fields(config)}
    entries = shared.pop("pruning_configs")
    for index, entry in enumerate(entries or [{}]):
        place = f"WeightPruningConfig.pruning_configs[{index}]"
        unknown = set(entry) - set(shared)
        notes += [f"{place}: {_ignored(name)}" for name in sorted(unknown)]
        options = {**shared, **{key: entry[key] for key in entry if key in shared}}
        translated.append(config_class(**_options(options, model)))
        notes += [note for note in _differences(options) if note not in notes]
    return translated, notes


def _options(given: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    start, end, scope = given["start_step"], given["end_step"], given["pruning_scope"]
    if scope not in _SCOPES:
        raise ConfigError(
            f"WeightPruningConfig.pruning_scope got {scope!r}; {suggest(str(scope), _SCOPES)}"
        )
    return {
        "sparsity": given["target_sparsity"],
        "start": StartAt(step=start),
        "end": StartAt(step=end) if end > start else None,
        "every": given["pruning_frequency"],
        "scope": _SCOPES[scope],
        "include": tuple(_weights(given, model)),
    }


def _weights(given: dict[str, Any], model: nn.Module) -> list[str]:
    kinds = given["pruning_op_types"]
    layers = [
        name
        for name, module in model.named_modules()
        if _has_matrix(module) and any(kind in type(module).__name__ for kind in kinds)
    ]
    wanted = [re.compile(name) for name in given["op_names"]] or [re.compile("")]
    unwanted = [re.compile(name) for name in given["excluded_op_names"]]
    last = list(_last_layer(model))
    chosen = [
        name
        for name in layers
        if _found(wanted, name) and not _found(unwanted, name) and name not in last
    ]
    if not chosen:
        raise ConfigError(
            f"WeightPruningConfig prunes nothing: no layer of the kinds {kinds} has a name that "
            f"op_names {given['op_names']} finds and excluded_op_names "
            f"{[*given['excluded_op_names'], *last]} does not; layers of these kinds: {layers}."
        )
    return [f"{name}.weight" if name else "weight" for name in chosen]


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() >= 2


def _found(patterns: Sequence[re.Pattern[str]], name: str) -> bool:
    return any(pattern.search(name) for pattern in patterns)


def _last_layer(model: nn.Module) -> Iterator[str]:
    """Yield the name of the classifier's layer, which 2.6 never prunes, if the model ends in it."""
    modules = [(name, type(m).__name__) for name, m in model.named_modules()]
    name, kind = [item for item in modules if item[1] != "Dropout"][-1]
    if kind in ("Linear", "Conv2d") and name:
        yield name


def _differences(given: dict[str, Any]) -> list[str]:
    return [
        f"WeightPruningConfig.{name}={given[name]!r} does not exist here: {what} ('{only}')."
        for name, (only, what) in _ONLY.items()
        if given[name] != only
        and (name != "sparsity_decay_type" or given["end_step"] > given["start_step"])
    ]


def _ignored(name: str) -> str:
    return f"'{name}' is no field of WeightPruningConfig that has a meaning here; it is ignored."
