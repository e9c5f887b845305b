"""Keeping the outputs of single layers for the length of one step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node

from compression_manager.errors import ConfigError
from compression_manager.models.calling import tensors_in
from compression_manager.models.hooks import ModelHooks


class Recorder:
    """Keeps the outputs of some layers of one model while it is switched on.

    The hooks stay valid when a layer changes its class, are inert in deep copies and are removed
    when the manager closes, or when nobody holds the recorder any more: they do not keep it. A
    loop may call the model several times in one step: for two views of a batch, or without
    gradients to see how well it does. All outputs that autograd follows are kept, and of the
    others the last.

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
        self._followed: dict[str, list[Any]] = {}
        self._last: dict[str, Any] = {}
        self._used: dict[str, int] = {}
        self._is_on = False
        for layer in dict.fromkeys(filter(None, layers)):
            self._watch(model.get_submodule(layer), layer, hooks)

    def start(self) -> None:
        """Keep what the layers return from here on."""
        self._is_on = True

    def stop(self) -> None:
        """Keep nothing any more, and let go of what was kept."""
        self._is_on = False
        self._used.clear()
        self.clear()

    def clear(self) -> None:
        """Let go of what was asked for and what came before it; of all if nothing was."""
        for layer, outputs in self._followed.items():
            del outputs[: self._used[layer] + 1 if layer in self._used else None]
        self._last.clear()
        self._used.clear()

    def output(self, layer: str, model_output: Any = None) -> Any:
        """Return what `layer` returned last, in the pass that returned `model_output`.

        Args:
            layer: one of the watched.
            model_output: what the model returned; of several passes that autograd follows, the
                one that led there is meant. If none did, the last.

        Raises:
            ConfigError: the layer was not called.
        """
        outputs = self._followed.get(layer)
        if outputs:
            index = _last_that_led_to(model_output, outputs) if len(outputs) > 1 else 0
            self._used[layer] = index
            return outputs[index]
        if layer not in self._last:
            raise ConfigError(
                f"the {self._where}'s layer '{layer}' was not called in this forward pass, so that "
                "there is no output to compare: it is dead code, or a fused path goes around it, "
                "or on_after_compute_loss was called before for this pass. Map a layer that is "
                "called, and call the hook once for each pass, with the sum of the task's losses."
            )
        return self._last[layer]

    def bytes(self) -> int:
        """Return the bytes of what is kept."""
        kept = {id(tensor): tensor for tensor in tensors_in([self._followed, self._last])}
        return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())

    def _watch(self, module: nn.Module, layer: str, hooks: ModelHooks) -> None:
        self._followed[layer] = []
        # A teacher outlives managers that were dropped without close().
        reference = weakref.ref(self)

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            recorder = reference()
            if recorder is not None:
                recorder._keep(layer, output)

        handle = hooks.add_forward_hook(module, keep)
        weakref.finalize(self, handle.remove).atexit = False

    def _keep(self, layer: str, output: Any) -> None:
        if not self._is_on:
            return
        if torch.is_grad_enabled():
            self._followed[layer].append(output)
        else:
            self._last[layer] = output


def _last_that_led_to(model_output: Any, outputs: list[Any]) -> int:
    """Return the index of the last of `outputs` in the graph of `model_output`, or of all."""
    wanted = {
        tensor.grad_fn: index
        for index, output in enumerate(outputs)
        for tensor in tensors_in(output)
        if tensor.grad_fn is not None
    }
    graph = _nodes_behind(model_output)
    last = len(outputs) - 1
    return max((index for node, index in wanted.items() if node in graph), default=last)


def _nodes_behind(value: Any) -> set[Node]:
    waiting = [tensor.grad_fn for tensor in tensors_in(value)]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return seen
