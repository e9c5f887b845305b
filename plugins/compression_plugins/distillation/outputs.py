"""Picking the logits out of whatever a model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from compression_manager.errors import ConfigError, blame_option, suggest


def pick_logits(output: Any, key: str | int | None, *, where: str, option: str) -> Tensor:
    """Return the logits in `output`.

    Args:
        output: a tensor, a tuple or list, a mapping, or an object with attributes
            (a `ModelOutput`).
        key: index or name to take; None takes a tensor itself, `logits` of a mapping or object,
            and the first element of a sequence.
        where: `student` or `teacher`, for messages.
        option: name of the option that chooses, for messages.

    Raises:
        ConfigError: nothing fits, or what fits is no floating-point tensor of at least one
            dimension.
    """
    with blame_option(option):
        return find_logits(output, key, where=where, owner="DistillationConfig", option=option)


def find_logits(
    output: Any, key: str | int | None, *, where: str, owner: str, option: str
) -> Tensor:
    """Do what `pick_logits` does; errors name `owner`, whose option chooses, and carry none."""
    advice = f"{owner}({option}=...)"
    return _checked(_pick(output, key, where, option, advice), where, advice)


def _checked(found: Any, where: str, advice: str) -> Tensor:
    if isinstance(found, Tensor) and found.dim() > 0 and found.is_floating_point():
        return found
    what = type(found).__name__
    if isinstance(found, Tensor):
        what = f"a tensor of shape {tuple(found.shape)} and dtype {found.dtype}"
    raise ConfigError(
        f"the {where}'s logits must be a floating-point tensor (*, classes), got {what}; choose "
        f"another element of its output with {advice}."
    )


def _pick(output: Any, key: str | int | None, where: str, option: str, advice: str) -> Any:
    if isinstance(output, Tensor):
        if key is None:
            return output
        raise ConfigError(f"the {where} returned a tensor, which needs no {option}={key!r}.")
    name = "logits" if key is None else key
    if isinstance(output, Mapping) and name in output:
        return output[name]
    if isinstance(name, str) and not isinstance(output, Mapping) and hasattr(output, name):
        return getattr(output, name)
    if isinstance(output, (tuple, list)) and not isinstance(key, str):
        index = 0 if key is None else key
        if -len(output) <= index < len(output):
            return output[index]
        raise ConfigError(
            f"the {where} returned {len(output)} elements; {option}={index} is out of range."
        )
    raise ConfigError(
        f"the {where} returned {type(output).__name__}, which holds no {name!r}; choose what is "
        f"meant with {advice}; {suggest(str(name), _names(output))}"
    )


def _names(output: Any) -> list[str]:
    if isinstance(output, Mapping):
        return [str(key) for key in output]
    fields = getattr(output, "_fields", None) or getattr(output, "__dict__", {})
    return [name for name in fields if not name.startswith("_")]


OutputKey = int | str | Callable[[Any], Any] | None


def pick_feature(output: Any, key: OutputKey, *, where: str) -> Tensor:
    """Return the feature in what a layer returned.

    Args:
        output: a tensor, a tuple or list, a mapping, or an object with attributes.
        key: index, name or function that picks; None takes a tensor itself, and the first element
            of a tuple or list.
        where: the layer, for messages.

    Raises:
        ConfigError: nothing fits, or what fits is no floating-point tensor.
    """
    if callable(key):
        try:
            found = key(output)
        except Exception as error:
            raise ConfigError(
                f"the {where}: the function failed with {error!r} on the layer's output, a "
                f"{type(output).__name__}."
            ) from error
    elif key is None and not isinstance(output, (Tensor, tuple, list)):
        raise ConfigError(
            f"the {where} returned {type(output).__name__}; say which part is meant: [layer, "
            f"output]; {suggest('', _names(output))}"
        )
    else:
        found = _pick(output, key, where, "output", "[layer, output]")
    if isinstance(found, Tensor) and found.is_floating_point():
        return found
    what = f"a tensor of dtype {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
    raise ConfigError(
        f"the {where} gives {what}, which is no feature; pick a floating-point tensor with the "
        "index, key or function of the output: [layer, output]."
    )
