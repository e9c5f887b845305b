"""Copying a model that is being trained."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn

from compression_manager.errors import QuantizationError
from compression_manager.models.calling import tensors_in
from compression_manager.models.hooks import strip_inert_hooks
from compression_manager.models.rebinding import Rebinding

_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OPTION_DICTS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
# Their hooks are part of the model. transformers notes in the model that it placed its own.
_LIBRARIES = ("torch", "transformers", "compression_manager")


def copy_model(model: nn.Module, *, keep_user_hooks: bool) -> nn.Module:
    """Return an eval-mode copy of `model` without gradients and without any manager's hooks.

    Hooks that are part of the model stay: methods of its own modules, torch's (weight_norm), and
    those by which transformers' models return their hidden states.
    Activations that a module keeps as attributes are copied without their graph, and functions made
    for the model or its modules, such as a decorated `forward`, call the copy; what torch.compile
    made of them is not compiled there.

    Args:
        model: any module; left untouched.
        keep_user_hooks: whether forward and backward hooks that were registered from outside
            stay as well; they are shared, not copied.

    Raises:
        QuantizationError: something in the model cannot be copied.
    """
    own = {id(module) for module in model.modules()}
    user_hooks = {id(hook): hook for hook in _hooks(model) if not _belongs_to_model(hook, own)}
    memo: dict[int, Any] = dict(user_hooks)
    for module in model.modules():
        for tensor in tensors_in(list(vars(module).values())):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    rebinding = Rebinding(model)
    rebinding.begin(memo)
    try:
        copied = copy.deepcopy(model, memo)
        rebinding.finish(memo)
    except Exception as error:
        raise QuantizationError(
            f"the model cannot be copied ({error!r}); a module probably keeps an open file, a lock "
            "or a graph of tensors as an attribute. Delete such attributes before converting."
        ) from error
    strip_inert_hooks(copied)
    if not keep_user_hooks:
        _remove_hooks(copied, set(user_hooks))
    return copied.eval()


def _hooks(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for name in _HOOK_DICTS
        for hook in getattr(module, name).values()
    ]


def _belongs_to_model(hook: Any, own: set[int]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    if id(getattr(hook, "__self__", None)) in own:
        return True
    origin = getattr(hook, "__module__", None) or type(hook).__module__
    return origin.partition(".")[0] in _LIBRARIES


def _remove_hooks(model: nn.Module, unwanted: set[int]) -> None:
    for module in model.modules():
        for name in _HOOK_DICTS:
            hooks = getattr(module, name)
            for key in [key for key, hook in hooks.items() if id(hook) in unwanted]:
                del hooks[key]
                for options in _OPTION_DICTS:
                    getattr(module, options).pop(key, None)
