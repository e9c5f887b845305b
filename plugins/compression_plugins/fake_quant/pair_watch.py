"""Watching conv-BatchNorm pairs in the passes after the one that they were found in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.models.hooks import ModelHooks
from compression_manager.quantization.autograd import runs_backward


class _Outputs(threading.local):
    """BatchNorm -> what its convolution returned and it has not read yet, of one thread."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}


class PairWatch:
    """Notices a convolution whose output does not go to its BatchNorm in some pass.

    A model may have another BatchNorm for each domain, or leave one out for some batches. Compiled
    passes, and those that a backward pass repeats, are not watched.

    Args:
        model: has the modules.
        hooks: of the manager.
        pairs: BatchNorm name -> convolution name.
        broken: called with the name of a BatchNorm, once.

    Attributes:
        pairs: those that hold so far.
    """

    def __init__(
        self,
        model: nn.Module,
        hooks: ModelHooks,
        pairs: Mapping[str, str],
        broken: Callable[[str], object],
    ) -> None:
        self.pairs = dict(pairs)
        self._broken = broken
        self._unread = _Outputs()
        self._handles = {
            batch_norm: (
                hooks.add_forward_hook(model.get_submodule(convolution), self._after(batch_norm)),
                hooks.add_forward_pre_hook(
                    model.get_submodule(batch_norm), self._before(batch_norm), with_kwargs=True
                ),
            )
            for batch_norm, convolution in pairs.items()
        }

    def settle(self) -> None:
        """Take what the last pass left unread for a pass without the BatchNorm."""
        for batch_norm in list(self._unread.of):
            self._break(batch_norm)

    def forget(self, batch_norm: str) -> None:
        """Watch a pair no longer."""
        self._unread.of.pop(batch_norm, None)
        self.pairs.pop(batch_norm, None)
        # torch goes through a copy of the hooks, so that they may be removed now.
        for handle in self._handles.pop(batch_norm, ()):
            handle.remove()

    def stop(self) -> None:
        """Watch nothing any more."""
        for handle in [handle for handles in self._handles.values() for handle in handles]:
            handle.remove()
        self._handles.clear()
        self.pairs.clear()
        self._unread.of.clear()

    def _after(self, batch_norm: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if torch.compiler.is_compiling() or runs_backward():
                return
            if batch_norm in self._unread.of:
                self._break(batch_norm)
            else:
                self._unread.of[batch_norm] = output

        return hook

    def _before(self, batch_norm: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if torch.compiler.is_compiling() or runs_backward():
                return
            output = self._unread.of.pop(batch_norm, None)
            if output is not (args[0] if args else kwargs["input"]):
                self._break(batch_norm)

        return hook

    def _break(self, batch_norm: str) -> None:
        self.forget(batch_norm)
        self._broken(batch_norm)
