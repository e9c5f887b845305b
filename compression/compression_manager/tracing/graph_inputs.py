"""Calling a runtime whose inputs are named tensors as a model is called.

What leads to each tensor among the model's arguments is kept with the file, so that it may be given
by position or by name, and mappings may have their entries in any order.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compression_manager.errors import ConfigError, suggest
from compression_manager.tracing.graph_outputs import restored
from compression_manager.tracing.input_sizes import (
    BATCH,
    Sizes,
    has_sizes,
    require_equal_samples,
    words_of_sizes,
)

# numpy arrays, which the runtimes bring along; this package does without.
Array = Any
Feed = Mapping[str, Array]
# Parameter, keys and indices.
Path = tuple[str, ...]
# Under which name files keep `Arguments`.
ARGUMENTS = "compression_manager.arguments"


@dataclass(frozen=True)
class Arguments:
    """What a file knows of the call that it stands for.

    Attributes:
        positional: parameters of the model that may be given by position, in order.
        variadic: that which takes all others, or None.
        paths: input of the file -> parameter, keys and indices that lead to its tensor.
        sizes: input of the file -> its sizes; none of what files of older versions take.
    """

    positional: tuple[str, ...]
    variadic: str | None
    paths: dict[str, Path]
    sizes: dict[str, Sizes] = field(default_factory=dict)

    @classmethod
    def of_names(cls, names: Sequence[str]) -> Arguments:
        """Return those of a file that says no more than how its inputs are called."""
        return cls(tuple(names), None, {name: (name,) for name in names})

    @classmethod
    def from_json(cls, text: str) -> Arguments:
        """Return what `to_json` described."""
        document = json.loads(text)
        return cls(
            tuple(document["positional"]),
            document["variadic"],
            {name: tuple(path) for name, path in document["paths"].items()},
            document.get("sizes", {}),
        )

    def to_json(self) -> str:
        """Return a text that `from_json` takes back."""
        return json.dumps(asdict(self))

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Path, Any]:
        """Return path -> value of all that the arguments hold, but None.

        Raises:
            ConfigError: there are more by position than the model has parameters, or one is given
                twice.
        """
        count = len(self.positional)
        if len(args) > count and self.variadic is None:
            raise ConfigError(
                f"the exported model takes at most {count} arguments by position "
                f"({', '.join(self.positional)}), got {len(args)}."
            )
        named = dict(zip(self.positional, args, strict=False))
        twice = sorted(named.keys() & kwargs.keys())
        if twice:
            raise ConfigError(f"the exported model got {', '.join(twice)} by position and by name.")
        found = [leaf for name, value in named.items() for leaf in _leaves(value, (name,))]
        if self.variadic is not None:
            found += _leaves(list(args[count:]), (self.variadic,))
        found += [leaf for name, value in kwargs.items() for leaf in _leaves(value, (name,))]
        return dict(found)


def positional_of(model: nn.Module) -> tuple[tuple[str, ...], str | None]:
    """Return the parameters of `forward` that may be given by position, and the variadic one."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # it is no function of Python
        return (), "args"
    names = [
        item.name
        for item in parameters
        if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)
    ]
    variadic = [item.name for item in parameters if item.kind is item.VAR_POSITIONAL]
    return tuple(names), next(iter(variadic), None)


def called_as_model(
    arguments: Arguments, compute: Callable[[Feed], Sequence[Array]], structure: Any = None
) -> Callable[..., Any]:
    """Return a function of the model's arguments to what `restored` makes of its outputs.

    Args:
        arguments: of the file.
        compute: the runtime; returns arrays that it does not use again.
        structure: of the outputs; None if the file does not know it.
    """
    name_of = {path: name for name, path in arguments.paths.items()}
    sizes = {arguments.paths[name]: item for name, item in arguments.sizes.items()}

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = arguments.leaves(args, kwargs)
        _check(leaves, name_of)
        _check_sizes(leaves, sizes)
        outputs = compute({name_of[path]: _array(value) for path, value in leaves.items()})
        return restored(structure, [torch.from_numpy(output) for output in outputs])

    return run


def constants_in(leaves: Mapping[Path, Any]) -> dict[Path, Any]:
    """Return those of `Arguments.leaves` that are no tensors."""
    return {path: value for path, value in leaves.items() if not isinstance(value, Tensor)}


def without_constants(run: Callable[..., Any]) -> Callable[..., Any]:
    """Let what `called_as_model` returned be called with the constants of the examples as well."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_none_for_constants, (args, kwargs))
        return run(*args, **kwargs)

    return call


def _none_for_constants(leaf: Any) -> Any:
    return None if isinstance(leaf, (bool, int, float, complex, str, bytes)) else leaf


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name, None), (*path, field.name))
    elif value is not None:
        yield path, value


def _check(leaves: Mapping[Path, Any], name_of: Mapping[Path, str]) -> None:
    """Raise ConfigError unless the leaves are tensors, one for each input."""
    for path, value in leaves.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"the exported model takes tensors only, got {value!r} as {' '.join(path)}; what "
                "is no tensor is fixed when the model is exported."
            )
        if path not in name_of:
            known = [" ".join(item) for item in name_of]
            raise ConfigError(
                f"the exported model takes no tensor as {' '.join(path)}; "
                f"{suggest(' '.join(path), known)}"
            )
    missing = [" ".join(path) for path in name_of if path not in leaves]
    if missing:
        raise ConfigError(
            f"the exported model needs a tensor as {', '.join(missing)}; it was exported with one."
        )


def _check_sizes(leaves: Mapping[Path, Tensor], sizes: Mapping[Path, Sizes]) -> None:
    """Raise ConfigError for other sizes than a file takes, with which it may compute anything."""
    for path, wanted in sizes.items():
        if not has_sizes(leaves[path], wanted):
            raise ConfigError(
                f"the exported model takes {' '.join(path)} of the sizes {words_of_sizes(wanted)}, "
                f"got {tuple(leaves[path].shape)}; export it with such examples."
            )
    require_equal_samples(
        {" ".join(path): len(leaves[path]) for path, wanted in sizes.items() if BATCH in wanted}
    )


def _array(value: Tensor) -> Array:
    return value.detach().cpu().numpy()
