"""Whether a training state belongs to this model and composition; nothing here changes anything."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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
    "tracked_gradients": Mapping,
    "plugins": Mapping,
    "tracked": Mapping,
    "objects": Mapping,
    "loader": Mapping,
    "random": Mapping,
    "evaluations": list,
    "stop": Mapping,
}
# Earlier releases did not write them.
_OPTIONAL = frozenset({"objects", "tracked_gradients"})
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
    missing = sorted(set(_KINDS) - set(state) - _OPTIONAL)
    if missing:
        raise CheckpointError(
            f"this is no training state of compression_manager: it lacks {', '.join(missing)}."
        )
    for key, kind in _KINDS.items():
        if key in _OPTIONAL and key not in state:
            continue
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
                f"{_of_quantizer(name)}"
            )
    for name, value in saved.items():
        if name not in own:
            raise CheckpointMismatchError(
                f"the checkpoint holds '{name}', which the model lacks; {suggest(name, own)}"
                f"{_of_quantizer(name)}"
            )
        here, there = _describe(own[name]), _describe(value)
        if here != there:
            raise CheckpointMismatchError(
                f"'{name}' is {there} in the checkpoint and {here} in the model."
            )


def _of_quantizer(name: str) -> str:
    """Return what it means that only one side has this tensor, if it is a quantizer's."""
    layer, quantizer, _ = name.partition("_quantizer.")
    if not quantizer:
        return ""
    layer = layer.rpartition(".")[0] or "(the model)"
    return (
        f" Only one of both quantizes the layer '{layer}': list the same plugin (QATConfig, for "
        "example) with the same rules."
    )


def check_names(
    state: Mapping[str, Any],
    *,
    gradients: Collection[str],
    tracked_gradients: Mapping[str, Collection[str]],
    plugins: Mapping[str, Any],
    tracked: Collection[str],
) -> None:
    """Raise CheckpointMismatchError unless a state has what the manager has.

    Args:
        state: a training state.
        gradients: names of the model's parameters.
        tracked_gradients: the same of every tracked module, by its name.
        plugins: present state of each plugin; one that keeps none may be added or left out.
        tracked: names of the tracked objects that keep state.
    """
    _check_gradients("the model", gradients, state["gradients"])
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
                f"'{name}' is tracked, but the checkpoint was written without it; it holds: "
                f"{_names(state['tracked'])}."
            )
    for name, saved in state.get("tracked_gradients", {}).items():
        _check_gradients(f"'{name}'", tracked_gradients.get(name, ()), saved)


def check_parameters(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise CheckpointMismatchError if an optimizer has its parameters in another order.

    torch finds the state of each by its number.

    Args:
        saved: what `Tracked.describe` returned when the checkpoint was written.
        own: what it returns now.
    """
    for name in saved.keys() & own.keys():
        groups = zip(saved[name]["parameters"], own[name]["parameters"], strict=False)
        for number, group in enumerate(groups):
            for there, here in zip(*group, strict=False):
                if there and here and there != here:
                    raise CheckpointMismatchError(
                        f"'{name}' has its parameters in another order: in group {number}, "
                        f"'{here}' stands where the checkpoint has '{there}', whose state it would "
                        "get. Give them in the same order."
                    )


def check_options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise CheckpointMismatchError if an optimizer's class has other options than the saved one.

    It would find neither these nor its own state in what was saved, and fail in the next step.
    torch itself fits what an earlier version of the same class saved.

    Args:
        saved: what `Tracked.describe` returned when the checkpoint was written.
        own: what it returns now.
    """
    for name in saved.keys() & own.keys():
        there, here = saved[name], own[name]
        options = there.get("options")  # earlier releases did not write them
        if not options or not here["options"] or there["class"] == here["class"]:
            continue
        differences = [
            f"{owner} has no {', '.join(sorted(lacking))}"
            for owner, lacking in (
                (there["class"], set(here["options"]) - set(options)),
                (here["class"], set(options) - set(here["options"])),
            )
            if lacking
        ]
        if differences:
            raise CheckpointMismatchError(
                f"'{name}' is a {here['class']} now, which cannot continue from the state of the "
                f"checkpoint's {there['class']}: {'; '.join(differences)}. To continue that "
                f"training, take a {there['class']}; to begin one with a new optimizer from its "
                "weights, call manager.load_weights(directory)."
            )


def changed_classes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return which tracked objects are of another class, a line each; as `check_parameters`."""
    return [
        f"'{name}' was a {saved[name]['class']}, and is a {own[name]['class']} now"
        for name in saved.keys() & own.keys()
        if saved[name]["class"] != own[name]["class"]
    ]


def changed_options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return what differs between two recipes (as `manager.state_dict()["recipe"]`), a line each.

    Only plugins that both list are compared.
    """
    plugins = saved.get("plugins", {}), own.get("plugins", {})
    return [
        change
        for name in plugins[0].keys() & plugins[1].keys()
        for change in _differences(f"plugins.{name}", plugins[0][name], plugins[1][name])
    ]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameter name -> gradient, of those that have one."""
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _check_gradients(owner: str, own: Collection[str], saved: Iterable[str]) -> None:
    for name in saved:
        if name not in own:
            raise CheckpointMismatchError(
                f"the checkpoint holds a gradient of '{name}', which is no parameter of {owner}; "
                f"{suggest(name, own)}"
            )


def _check_plugins(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for name, state in saved.items():
        if state and name not in own:
            raise CheckpointMismatchError(
                f"the checkpoint holds state of plugin '{name}', which is not listed now. To "
                f"continue that training, list it; to start another one from its weights, call "
                f"manager.load_weights(directory). Listed now: {_names(own)}."
            )
    for name, state in own.items():
        if state and not saved.get(name):
            raise CheckpointMismatchError(
                f"plugin '{name}' keeps state, but the checkpoint was written without it. To "
                f"continue that training, leave it out; to start another one from its weights, "
                f"call manager.load_weights(directory). The checkpoint has: {_names(saved)}."
            )


def _differences(path: str, saved: Any, own: Any) -> list[str]:
    if isinstance(saved, Mapping) and isinstance(own, Mapping) and saved.keys() == own.keys():
        return [
            change for key in own for change in _differences(f"{path}.{key}", saved[key], own[key])
        ]
    if isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        return [
            change
            for index, (there, here) in enumerate(zip(saved, own, strict=True))
            for change in _differences(f"{path}[{index}]", there, here)
        ]
    return [] if saved == own else [f"{path}: {saved!r} in the checkpoint, {own!r} now"]


def _names(plugins: Iterable[str]) -> str:
    return ", ".join(sorted(plugins)) or "none"


def _describe(value: object) -> str:
    """Return what must agree; entries that are no tensors (extra state) may differ."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return "no tensor"
