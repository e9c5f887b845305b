"""The lines of a report that say how layers compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from compression_manager.quantization.layers.decisions import LayerArithmetic

# Fewer names are as short written out.
_FEWEST = 3
# What stands for a number in a name's pattern; no part of a name holds a dot.
_NUMBER = "."

_Pattern = tuple[str, ...]


def arithmetic_lines(layers: Mapping[str, LayerArithmetic]) -> list[str]:
    """Return lines that say who computes on what, why, and by which kernel.

    Args:
        layers: by name; those with one answer share a line.
    """
    lines = []
    for answer, names in _grouped(layers, str).items():
        lines.append(f"{answer}: {in_short(names)}")
        reasons = _grouped({name: layers[name] for name in names}, _reasons)
        lines += [f"  {reason}: {in_short(those)}" for reason, those in reasons.items() if reason]
    kernels = _grouped(layers, lambda arithmetic: arithmetic.kernel)
    lines += [
        f"products of integers by {kernel}: {in_short(names)}"
        for kernel, names in kernels.items()
        if kernel
    ]
    return lines


def in_short(names: Sequence[str]) -> str:
    """Return names of layers, those that differ in one number alone as `layers.{0-3}.linear`."""
    counts = Counter(pattern for name in names for pattern, _ in _patterns(name))
    groups: dict[_Pattern, dict[int, str]] = {}
    for name in names:
        patterns = dict(_patterns(name))
        best = max(patterns, key=counts.__getitem__, default=(name,))
        groups.setdefault(best, {})[patterns.get(best, 0)] = name
    return ", ".join(
        _written(pattern, members)
        if len(members) >= _FEWEST and _NUMBER in pattern
        else ", ".join(members.values())
        for pattern, members in groups.items()
    )


def _patterns(name: str) -> Iterator[tuple[_Pattern, int]]:
    """Yield what is left of a name without each of its numbers, and that number."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        # Others, such as "00", are not what their number is written as.
        if part.isdecimal() and part == str(int(part)):
            yield (*parts[:index], _NUMBER, *parts[index + 1 :]), int(part)


def _written(pattern: _Pattern, numbers: Mapping[int, str]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return ".".join(f"{{{shown}}}" if part == _NUMBER else part for part in pattern)


def _reasons(arithmetic: LayerArithmetic) -> str:
    return "; ".join(arithmetic.reasons)


def _grouped(
    layers: Mapping[str, LayerArithmetic], answer: Callable[[LayerArithmetic], str]
) -> dict[str, list[str]]:
    """Return answer -> names of the layers that give it, in their order."""
    names_of: dict[str, list[str]] = {}
    for name, arithmetic in layers.items():
        names_of.setdefault(answer(arithmetic), []).append(name)
    return names_of
