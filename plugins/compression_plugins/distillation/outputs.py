"""Picking the logits out of whatever a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compression_manager.errors import ConfigError, suggest


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
        ConfigError: nothing fits, or what fits is no tensor of at least one dimension.
    """
    found = _pick(output, key, where, option)
    if not isinstance(found, Tensor) or found.dim() == 0:
        what = f"a scalar ({found})" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"the {where}'s logits are {what}; choose another element of its output with "
            f"DistillationConfig({option}=...)."
        )
    return found


def _pick(output: Any, key: str | int | None, where: str, option: str) -> Any:
    if isinstance(output, Tensor) and key is None:
        return output
    if isinstance(output, (tuple, list)) and not isinstance(key, str):
        index = 0 if key is None else key
        if -len(output) <= index < len(output):
            return output[index]
        raise ConfigError(
            f"the {where} returned {len(output)} elements; {option}={index} is out of range."
        )
    name = "logits" if key is None else key
    if isinstance(output, Mapping) and name in output:
        return output[name]
    if isinstance(name, str) and hasattr(output, name):
        return getattr(output, name)
    valid = [str(item) for item in output] if isinstance(output, Mapping) else []
    raise ConfigError(
        f"the {where} returned {type(output).__name__}, which holds no {name!r}; choose its logits "
        f"with DistillationConfig({option}=...); {suggest(str(name), valid)}"
    )
