"""Which layer of the student is compared with which layer of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from compression_manager.errors import ConfigError, suggest
from compression_plugins.distillation.outputs import OutputKey


@dataclass(frozen=True)
class TapPoint:
    """A layer, and the part of its output that is meant.

    Attributes:
        layer: qualified name or glob of the layer; `""` is the whole model.
        output: index, key or function that picks a tensor from the output; None takes the tensor
            itself or the first element.
    """

    layer: str
    output: OutputKey = None

    def __str__(self) -> str:
        return f"{repr(self.layer) if self.layer else 'the whole model'}{self._part()}"

    def within(self, model: str) -> str:
        """Return the point as a part of `model`, `student` or `teacher`, for messages."""
        return f"{model}'s {self}" if self.layer else f"{model}{self._part()}"

    def _part(self) -> str:
        if self.output is None:
            return ""
        return f", output {getattr(self.output, '__qualname__', repr(self.output))}"


@dataclass(frozen=True)
class LayerMapping:
    """One comparison: a layer of the student, and one of the teacher."""

    student: TapPoint
    teacher: TapPoint

    @property
    def name(self) -> str:
        """How the comparison is called in metrics: by the student's layer."""
        return self.student.layer or "output"

    def __str__(self) -> str:
        return f"{self.student} and {self.teacher}"


def parse_mappings(owner: object, field: str, value: object) -> tuple[LayerMapping, ...]:
    """Read `layer_mappings`.

    An item is one name for both models (`"layer3"` or `["layer3"]`), a pair of names
    (`["layer3", "blocks.7"]`), or a pair of points (`[["layer3", 0], ["blocks.7", "hidden"]]`).

    Raises:
        ConfigError: names the item and the forms that are valid.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
        raise ConfigError(
            f"{_name(owner)}.{field} must be a list with at least one item, for example "
            f"[['layer3', 'blocks.7']], got {value!r}."
        )
    return tuple(
        parse_mapping(f"{_name(owner)}.{field}[{index}]", item) for index, item in enumerate(value)
    )


def parse_mapping(place: str, item: object) -> LayerMapping:
    """Read one item of `layer_mappings`; `place` says in errors which one."""
    if isinstance(item, str):
        return LayerMapping(TapPoint(item), TapPoint(item))
    if isinstance(item, (list, tuple)) and len(item) == 1:
        point = _parse_point(place, item[0])
        return LayerMapping(point, point)
    if isinstance(item, (list, tuple)) and len(item) == 2:
        return LayerMapping(_parse_point(place, item[0]), _parse_point(place, item[1]))
    raise _invalid(place, item)


def _parse_point(place: str, value: object) -> TapPoint:
    if isinstance(value, str):
        return TapPoint(value)
    if isinstance(value, (list, tuple)) and len(value) in (1, 2) and isinstance(value[0], str):
        key = value[1] if len(value) == 2 else None
        is_index = isinstance(key, int) and not isinstance(key, bool)
        if key is None or is_index or isinstance(key, str) or callable(key):
            return TapPoint(value[0], key)
    raise _invalid(place, value)


def _invalid(place: str, value: object) -> ConfigError:
    return ConfigError(
        f"{place}: {value!r} is no layer mapping; valid are a name ('layer3'), a pair of names "
        "(['layer3', 'blocks.7']) and a pair of points ([['layer3', 0], ['blocks.7', 'hidden']]), "
        "where a point is a layer and the index, key or function of its output."
    )


def expand(mapping: LayerMapping, student: nn.Module, teacher: nn.Module) -> list[LayerMapping]:
    """Return `mapping` with the globs replaced by the layers that they match, in model order.

    A `*` stands for one part of a dotted name or a piece of it. The n-th match in the student is
    paired with the n-th in the teacher.

    Raises:
        ConfigError: a layer does not exist (with the nearest names), or the numbers of matches
            differ.
    """
    mine = matching_layers(mapping.student.layer, student, "student")
    theirs = matching_layers(mapping.teacher.layer, teacher, "teacher")
    if len(mine) != len(theirs):
        raise ConfigError(
            f"'{mapping.student.layer}' matches {len(mine)} layers of the student "
            f"({_listed(mine)}) and '{mapping.teacher.layer}' {len(theirs)} of the teacher "
            f"({_listed(theirs)}); they are compared in pairs, so that both must match the same "
            "number."
        )
    return [
        LayerMapping(TapPoint(a, mapping.student.output), TapPoint(b, mapping.teacher.output))
        for a, b in zip(mine, theirs, strict=True)
    ]


def matching_layers(pattern: str, model: nn.Module, where: str) -> list[str]:
    """Return the names of the layers that `pattern` matches.

    Raises:
        ConfigError: there is none; `where` says of which model.
    """
    if not pattern:
        return [""]
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    matches = [name for name in names if _matches(name, pattern)]
    if not matches:
        raise ConfigError(f"the {where} has no layer '{pattern}'; {suggest(pattern, names)}")
    return matches


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown}, ..." if len(names) > 5 else shown


def _name(owner: object) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__
