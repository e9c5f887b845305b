"""What a plugin may leave behind: on a model, on its optimizer, in the process."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_globals
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_globals

Traces = Mapping[str, Any]
"""What something is -> how it was when it was looked at."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class _Identity:
    """Equal only for the very same object, which it keeps alive."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __repr__(self) -> str:
        value = self.value
        return getattr(value, "__qualname__", None) or f"a {type(value).__name__}"


def model_traces(model: nn.Module) -> Traces:
    """Return classes, modes, hooks, attributes, parameters and buffers; no values of tensors."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        where = f"module '{name}'" if name else "the model"
        found[f"class of {where}"] = _Identity(type(module))
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                found[f"attribute '{key}' of {where}"] = _frozen(value)
        found[f"children of {where}"] = _frozen(module._modules)
        found[f"parameters of {where}"] = list(module._parameters)
        found[f"buffers of {where}"] = [
            (key, None if buffer is None else (buffer.dtype, tuple(buffer.shape)))
            for key, buffer in module._buffers.items()
        ]
    for name, parameter in model.named_parameters():
        found[f"parameter '{name}'"] = _Identity(parameter)
        found[f"requires_grad of parameter '{name}'"] = parameter.requires_grad
        for hooks in _TENSOR_HOOKS:
            found[f"{hooks} of parameter '{name}'"] = _hook_list(getattr(parameter, hooks, None))
    found |= _method_traces(type(module) for module in model.modules())
    return found


def optimizer_traces(optimizer: Optimizer) -> Traces:
    """Return groups, their options (without the learning rate), hooks and foreign state."""
    found: dict[str, Any] = {"number of parameter groups": len(optimizer.param_groups)}
    known = set()
    for index, group in enumerate(optimizer.param_groups):
        known |= {id(parameter) for parameter in group["params"]}
        for key, value in group.items():
            if key != "lr":
                found[f"'{key}' of parameter group {index}"] = _frozen(value)
    foreign = sum(id(parameter) not in known for parameter in optimizer.state)
    found["parameters with state that are in no group"] = foreign
    for key, value in vars(optimizer).items():
        if "hooks" in key or key == "step":
            found[f"'{key}' of the optimizer"] = _frozen(value)
    return found


def resource_traces() -> Traces:
    """Return the threads, children and open files of the process."""
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "child processes": sorted(child.name for child in multiprocessing.active_children()),
        "open files": _open_files(),
    }


def setting_traces() -> Traces:
    """Return the settings of the process and of torch."""
    return {
        **{f"handler of {s.name}": _Identity(signal.getsignal(s)) for s in signal.Signals},
        **{f"environment variable {key}": value for key, value in os.environ.items()},
        "working directory": os.getcwd(),
        "sys.excepthook": _Identity(sys.excepthook),
        "sys.stdout": _Identity(sys.stdout),
        "sys.stderr": _Identity(sys.stderr),
        "warnings.showwarning": _Identity(warnings.showwarning),
        "handlers of the root logger": _frozen(logging.root.handlers),
        "level of the root logger": logging.root.level,
        "whether Python collects garbage": gc.isenabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "whether torch computes gradients": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "whether torch is deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch's precision of float32 products": torch.get_float32_matmul_precision(),
        "cuDNN's settings": [
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.allow_tf32,
        ],
        **{
            f"torch's {key}": _hook_list(value)
            for owner in (module_globals, optimizer_globals)
            for key, value in vars(owner).items()
            if key.startswith("_global_") and isinstance(value, dict)
        },
    }


def changes(before: Traces, after: Traces) -> list[str]:
    """Return one line for each trace that is new, gone or another."""
    lines = [f"{key} is gone" for key in before if key not in after]
    for key, value in after.items():
        if key not in before:
            lines.append(f"{key} is new: {value!r}")
        elif before[key] != value:
            lines.append(f"{key} was {before[key]!r} and is {value!r}")
    return lines


def _frozen(value: Any) -> Any:
    """Return a copy that can be compared later; objects are compared by identity."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        if all(isinstance(key, int) for key in value):
            return _hook_list(value)
        return [(key, _frozen(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_frozen(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return _Identity(value)


def _hook_list(hooks: Mapping[int, Any] | None) -> list[Any]:
    """Return hooks without their keys, which count up whenever one is added."""
    return [_frozen(hook) for hook in (hooks or {}).values()]


def _method_traces(classes: Iterator[type]) -> dict[str, Any]:
    bases = {base for owner in classes for base in owner.__mro__ if base is not object}
    return {
        f"method {owner.__qualname__}.{key}": _Identity(value)
        for owner in sorted(bases, key=lambda item: item.__qualname__)
        for key, value in vars(owner).items()
        if isinstance(value, types.FunctionType)
    }


def _open_files() -> list[str]:
    """Return what the process has open; empty where the system does not tell."""
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        return []
    files = []
    for number in os.listdir(folder):
        try:
            files.append(os.readlink(f"{folder}/{number}"))
        except OSError:  # the listing itself
            continue
    return sorted(files)
