"""`prepare_compression`: from a model and its configuration to a manager."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compression_manager.configuration.checks import MAX_SEED, is_seed
from compression_manager.context import Context
from compression_manager.errors import CompressionError, ConfigError
from compression_manager.manager import CompressionManager
from compression_manager.plugin_host.composition import (
    PluginSpec,
    complete,
    describe,
    plugins_from_list,
    plugins_from_recipe,
    refuse_runtime_objects,
)
from compression_manager.state import seed_everything


def prepare_compression(
    model: nn.Module,
    configs: Sequence[PluginSpec] | str | Path,
    *,
    overrides: Sequence[str] = (),
    example_inputs: Any = None,
    seed: int | None = None,
    **runtime_objects: Any,
) -> CompressionManager:
    """Let plugins shape `model` in place and return the manager of its training.

    Args:
        model: the model to train; stays the same object with the same Parameters.
        configs: plugin configs in the order in which plugins run, or the path of a recipe.
        overrides: with a recipe: dotted assignments such as
            `plugins.distillation.criterion.temperature=4`.
        example_inputs: what the loop will call the model with (a tensor, a tuple or a mapping);
            lets plugins check everything that needs a forward pass now.
        seed: seeds Python, numpy and torch; a recipe may hold it as well.
        **runtime_objects: with a recipe: live objects by option name, for example
            `teacher_model=teacher`; for one of several instances `**{"second.teacher_model": t}`.

    Raises:
        ConfigError: an argument, the recipe or the composition is invalid.
        PluginError: a plugin cannot be loaded or failed.

    After an error the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"prepare_compression takes a torch.nn.Module as model, got {type(model).__name__}."
        )
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        raise ConfigError(
            f"prepare_compression takes the model before {type(model).__name__} wraps it, which "
            "would not know what plugins add; prepare first, then wrap manager.model."
        )
    _check_seed(seed)
    if isinstance(configs, (str, Path)):
        plugins, recipe_seed = plugins_from_recipe(configs, overrides, runtime_objects)
        seed = recipe_seed if seed is None else seed
    else:
        if overrides:
            raise ConfigError("overrides apply to a recipe; here configs is a list.")
        refuse_runtime_objects(set(runtime_objects), configs)
        plugins = plugins_from_list(configs)
    plugins = complete(plugins)
    if seed is not None:
        seed_everything(seed)
    context = Context(model, example_inputs=example_inputs, recipe=describe(plugins, seed))
    manager = CompressionManager(context, plugins)
    try:
        manager.shape_model()
    except BaseException as error:
        if isinstance(error, CompressionError) and isinstance(configs, (str, Path)):
            place = configs if error.key_path is None else f"{configs}: plugins"
            separator = ": " if error.key_path is None else "."
            error.args = (f"{place}{separator}{error}", *error.args[1:])
        try:
            manager.close()
        except Exception as failure:
            error.add_note(f"while closing: {failure}")
        raise
    return manager


def _check_seed(seed: object) -> None:
    if seed is not None and not is_seed(seed):
        raise ConfigError(f"seed takes a whole number from 0 to {MAX_SEED}, got {seed!r}.")
