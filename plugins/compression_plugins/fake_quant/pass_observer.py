"""Observing forward passes of training, for the conv-BatchNorm pairs in them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten

from compression_manager.models.hooks import ModelHooks
from compression_manager.quantization.autograd import runs_backward
from compression_plugins.fake_quant.pair_finder import ObservedPass, PairFinder

# A model that returns something new in every pass is not observed for ever.
_MOST_PASSES = 16

_Kind = tuple[TreeSpec, list[object]]


class PassObserver:
    """Observes the first complete pass, whoever runs it, and the first of each kind in training.

    An observed pass takes longer. Passes are of one kind if flags, strings and structure of their
    inputs and outputs are equal: those are what a model branches on, except for its attributes,
    which mostly show in what it returns. A pass that raises is forgotten, and the one after it
    observed. Compiled passes, and those that a backward pass repeats, are not observed.

    Args:
        model: what is called.
        hooks: of the manager.
        found: called with what each observed pass showed.
    """

    def __init__(
        self, model: nn.Module, hooks: ModelHooks, found: Callable[[ObservedPass], object]
    ) -> None:
        self._finder = PairFinder(model)
        self._found = found
        self._kinds: list[_Kind] = []  # no set: the structures of some libraries have no hash
        self._is_first = True
        self._is_due = False
        self._passes_left = _MOST_PASSES
        self._handles = (
            hooks.add_forward_pre_hook(model, self._begin, with_kwargs=True),
            # Also called when forward raises, so that the observation ends in any case.
            hooks.add_forward_hook(model, self._end, with_kwargs=True, always_call=True),
        )

    def stop(self) -> None:
        """Observe nothing any more; KeyboardInterrupt leaves a pass without a call of its hooks."""
        for handle in self._handles:
            handle.remove()
        if self._finder.active:
            self._finder.abandon()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling() or runs_backward():
            return
        if self._finder.active:  # the last pass was left by KeyboardInterrupt
            self._finder.abandon()
        if self._is_first or (module.training and self._is_unknown(args, kwargs)):
            self._finder.__enter__()

    def _is_unknown(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        return self._is_due or _kind((args, kwargs)) not in self._kinds

    def _end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if torch.compiler.is_compiling() or runs_backward():
            return
        if sys.exception() is not None:
            if self._finder.active:
                self._finder.abandon()
            return
        is_observed = self._finder.active
        if is_observed:
            self._finder.__exit__(None, None, None)
            self._is_first = False
        if module.training:
            returned = _kind(output)
            # Like inputs led elsewhere, so that the next pass is likely to go there too.
            self._is_due = not is_observed and returned not in self._kinds
            if is_observed:
                self._kinds += [_kind((args, kwargs)), returned]
        if is_observed:
            self._report(output)

    def _report(self, output: Any) -> None:
        self._found(self._finder.observed(output))
        self._passes_left -= 1
        if not self._passes_left:
            self.stop()


def _kind(values: Any) -> _Kind:
    leaves, structure = tree_flatten(values)
    return structure, [leaf if isinstance(leaf, bool | str) else type(leaf) for leaf in leaves]
