"""Which weights of a model can be pruned, and which elements of them are."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from compression_manager import ConfigError, blame_option, suggest


def select_weights(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the names of the parameters to prune: matrices and larger, not vectors.

    A parameter that layers share has several names. It is selected by any of them, and returned
    under the first.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to prune.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() >= 2:
            names.setdefault(parameter, []).append(name)
    valid = [name for aliases in names.values() for name in aliases]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for index, pattern in enumerate(patterns):
            if not any(fnmatchcase(name, pattern) for name in valid):
                with blame_option(f"{option}[{index}]"):
                    raise ConfigError(f"'{pattern}' names no weight; {suggest(pattern, valid)}")
    selected = [
        aliases[0]
        for aliases in names.values()
        if _any_matches(aliases, include) and not _any_matches(aliases, exclude)
    ]
    if not selected:
        raise ConfigError(f"no weight is left to prune; {suggest('', valid)}")
    return selected


def prune(weights: Sequence[tuple[Tensor, Tensor]], sparsity: float) -> list[Tensor]:
    """Return masks under which `round(sparsity * n)` of the n elements of all weights are zero.

    These are the ones that the present masks set to zero already, then those of smallest
    magnitude; of equal ones the first, so that every process finds the same.

    Args:
        weights: pairs of a weight (floating point, any shape) and its present mask (bool, the
            same shape), which is True where an element is kept.
        sparsity: from 0 to 1.
    """
    device = weights[0][0].device
    magnitudes = [
        weight.detach().abs().masked_fill(~mask, -1).flatten().to(device)
        for weight, mask in weights
    ]
    order = torch.cat(magnitudes).sort(stable=True).indices
    kept = torch.ones_like(order, dtype=torch.bool)
    kept[order[: round(sparsity * len(order))]] = False
    parts = torch.split(kept, [weight.numel() for weight, _ in weights])
    return [
        part.reshape(weight.shape).to(weight.device)
        for part, (weight, _) in zip(parts, weights, strict=True)
    ]


def _any_matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
