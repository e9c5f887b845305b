"""Keeping the outputs of single layers for the length of one step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from compression_manager.errors import ConfigError
from compression_manager.model_call import tensors_in
from compression_manager.model_hooks import ModelHooks


class Recorder:
    """Keeps the last output of some layers of one model while it is switched on.

    The hooks stay valid when a layer changes its class, are inert in deep copies and are removed
    when the manager closes. A layer that is called several times in one pass leaves its last
    output.

    Args:
        model: whose layers are watched.
        layers: their qualified names; the empty one, of the model itself, is left out.
        hooks: of the manager.
        where: `student` or `teacher`, for messages.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[str], hooks: ModelHooks, *, where: str
    ) -> None:
        self._where = where
        self._outputs: dict[str, Any] = {}
        self._is_on = False
        for layer in dict.fromkeys(filter(None, layers)):
            self._watch(model.get_submodule(layer), layer, hooks)

    def start(self) -> None:
        """Keep what the layers return from here on."""
        self._is_on = True

    def stop(self) -> None:
        """Keep nothing any more, and let go of what was kept."""
        self._is_on = False
        self.clear()

    def clear(self) -> None:
        """Let go of what was kept."""
        self._outputs.clear()

    def output(self, layer: str) -> Any:
        """Return what `layer` returned last.

        Raises:
            ConfigError: the layer was not called.
        """
        if layer not in self._outputs:
            raise ConfigError(
                f"the {self._where}'s layer '{layer}' was not called in this forward pass, so that "
                "there is no output to compare: it is dead code, or a fused path goes around it. "
                "Map a layer that is called."
            )
        return self._outputs[layer]

    def bytes(self) -> int:
        """Return the bytes of what is kept."""
        kept = {id(tensor): tensor for tensor in tensors_in(self._outputs)}
        return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())

    def _watch(self, module: nn.Module, layer: str, hooks: ModelHooks) -> None:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._is_on:
                self._outputs[layer] = output

        hooks.add_forward_hook(module, keep)
