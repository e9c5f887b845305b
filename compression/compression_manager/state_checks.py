"""Whether a training state belongs to this model and composition; nothing here changes anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from compression_manager.errors import CheckpointError, CheckpointMismatchError, suggest

_KINDS: dict[str, type] = {
    "version": int,
    "epoch": int,
    "step": int,
    "global_step": int,
    "recipe": Mapping,
    "model": Mapping,
    "accumulating": bool,
    "gradients": Mapping,
    "plugins": Mapping,
    "tracked": Mapping,
    "loader": Mapping,
    "random": Mapping,
    "evaluations": list,
    "stop": Mapping,
}
_INNER_KEYS = {
    "loader": frozenset({"epoch_start", "random", "generators"}),
    "stop": frozenset({"should_stop", "reason"}),
}


def check_kinds(state: object) -> None:
    """Raise CheckpointError unless `state` is built like a training state."""
    if not isinstance(state, Mapping):
        raise CheckpointError(
            "this is no training state of compression_manager: expected a mapping, got "
            f"{type(state).__name__}."
        )
    missing = sorted(set(_KINDS) - set(state))
    if missing:
        raise CheckpointError(
            f"this is no training state of compression_manager: it lacks {', '.join(missing)}."
        )
    for key, kind in _KINDS.items():
        value = state[key]
        if not isinstance(value, kind) or not _INNER_KEYS.get(key, frozenset()) <= set(
            value if isinstance(value, Mapping) else ()
        ):
            raise CheckpointError(
                f"this is no training state of compression_manager: its '{key}' is not what "
                f"manager.state_dict() gives (a {kind.__name__})."
            )


def check_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raise CheckpointMismatchError unless names, shapes and dtypes are those of `model`."""
    own = model.state_dict()
    for name in own:
        if name not in saved:
            raise CheckpointMismatchError(
                f"the checkpoint holds no '{name}', which the model has; {suggest(name, saved)}"
            )
    for name, value in saved.items():
        if name not in own:
            raise CheckpointMismatchError(
                f"the checkpoint holds '{name}', which the model lacks; {suggest(name, own)}"
            )
        here, there = _describe(own[name]), _describe(value)
        if here != there:
            raise CheckpointMismatchError(
                f"'{name}' is {there} in the checkpoint and {here} in the model."
            )


def check_names(
    state: Mapping[str, Any],
    *,
    gradients: Collection[str],
    plugins: Mapping[str, Any],
    tracked: Collection[str],
) -> None:
    """Raise CheckpointMismatchError unless a state has what the manager has.

    Args:
        state: a training state.
        gradients: names of the model's parameters.
        plugins: present state of each plugin; one that keeps none may be added or left out.
        tracked: names of the tracked objects that keep state.
    """
    for name in state["gradients"]:
        if name not in gradients:
            raise CheckpointMismatchError(
                f"the checkpoint holds a gradient of '{name}', which is no parameter of the "
                f"model; {suggest(name, gradients)}"
            )
    _check_plugins(plugins, state["plugins"])
    for name in state["tracked"]:
        if name not in tracked:
            raise CheckpointMismatchError(
                f"the checkpoint holds the state of '{name}'; register it with "
                f"manager.track({name}=...) before resuming."
            )
    for name in tracked:
        if name not in state["tracked"]:
            raise CheckpointMismatchError(
                f"'{name}' is tracked, but the checkpoint was written without it; "
                f"{suggest(name, state['tracked'])}"
            )


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameter name -> gradient, of those that have one."""
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _check_plugins(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for name, state in saved.items():
        if state and name not in own:
            raise CheckpointMismatchError(
                f"the checkpoint holds state of plugin '{name}', which is not in the present "
                f"composition; {suggest(name, own)}"
            )
    for name, state in own.items():
        if state and not saved.get(name):
            raise CheckpointMismatchError(
                f"plugin '{name}' keeps state, but the checkpoint was written without it; "
                f"{suggest(name, saved)}"
            )


def _describe(value: object) -> str:
    """Return what must agree; entries that are no tensors (extra state) may differ."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return "no tensor"
