"""`manager.model`: the student, which becomes the int8 model where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_INNER = "_model."


class Saver:
    """Calls `function(model, directory)`; deep copies of what holds it share it."""

    def __init__(self, function: Callable[[nn.Module, str | Path | None], Path]) -> None:
        self.function = function

    def __deepcopy__(self, memo: dict[int, Any]) -> Saver:
        return self


class CompressedModel(nn.Module):
    """Calls the model; names of parameters and state_dict are the model's own.

    Whatever the model has as an attribute can be read here as well. 2.6's is alike, with other
    names in state_dict.

    Attributes:
        model: the model itself: the student, and the int8 model once training has ended.
    """

    _model: nn.Module

    def __init__(self, model: nn.Module, saver: Saver) -> None:
        super().__init__()
        self._saver = saver
        self.become(model)
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]  # untyped in torch
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]  # untyped in torch

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self._model

    def become(self, model: nn.Module) -> None:
        """Call another model from here on."""
        self._model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self._model(*args, **kwargs)

    def save(self, root: str | Path | None = None) -> Path:
        """Write the model for `load`; with quantization in its int8 form.

        Args:
            root: the directory; by default `nc_workspace`.
        """
        return self._saver.function(self._model, root)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters under the model's own names."""
        for name, value in super().named_parameters(prefix, recurse, remove_duplicate):
            yield _own_name(name, prefix), value

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers under the model's own names."""
        for name, value in super().named_buffers(prefix, recurse, remove_duplicate):
            yield _own_name(name, prefix), value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_model":
                raise
            return getattr(self._model, name)


def unwrapped(model: Any) -> Any:
    """Return the model in a CompressedModel; anything else as it is."""
    return model.model if isinstance(model, CompressedModel) else model


def _own_name(name: str, prefix: str) -> str:
    start = f"{prefix}." if prefix else ""
    return start + name.removeprefix(start).removeprefix(_INNER)


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    inner = prefix + _INNER
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    others = set(module._modules) | set(module._parameters) | set(module._buffers)
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.partition(".")[0] not in others:
            state[prefix + _INNER + name] = state.pop(key)
