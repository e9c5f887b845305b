"""Forward hooks that leave no trace: removed at close, absent from copies and pickles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class _DetachableHook:
    """Calls `function`; a copy or a pickle of the module that holds it gets an inert one.

    torch copies and pickles hooks together with their module, and a copied bound method would
    drag a copy of the plugin (and its teacher) along and fire into a list nobody reads.
    """

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.function is None else self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[type[_DetachableHook], tuple[None]]:
        return _DetachableHook, (None,)


class ModelHooks:
    """The forward hooks that the plugins of one manager placed."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def add_forward_hook(
        self, module: nn.Module, hook: Callable[..., Any], **options: Any
    ) -> RemovableHandle:
        """Register a forward hook; `options` as in `Module.register_forward_hook`."""
        handle = module.register_forward_hook(_DetachableHook(hook), **options)
        self._handles.append(handle)
        return handle

    def add_forward_pre_hook(
        self, module: nn.Module, hook: Callable[..., Any], **options: Any
    ) -> RemovableHandle:
        """Register a pre-forward hook; `options` as in `Module.register_forward_pre_hook`."""
        handle = module.register_forward_pre_hook(_DetachableHook(hook), **options)
        self._handles.append(handle)
        return handle

    def remove_all(self) -> None:
        """Remove every hook that was added."""
        while self._handles:
            self._handles.pop().remove()


def strip_inert_hooks(model: nn.Module) -> None:
    """Delete from a deep copy the inert remains of hooks that a manager had placed."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            inert = [
                key
                for key, hook in hooks.items()
                if isinstance(hook, _DetachableHook) and hook.function is None
            ]
            for key in inert:
                del hooks[key]
                for options in (
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                    module._forward_pre_hooks_with_kwargs,
                ):
                    options.pop(key, None)
