"""How a live teacher runs: in bfloat16, with int8 weights, compiled, in channels-last format."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from compression_manager.configuration.checks import require_choice, require_type
from compression_manager.models.calling import tensors_in
from compression_manager.models.copying import copy_model
from compression_manager.plugin import option
from compression_plugins.distillation.teachers.int8_weights import with_int8_weights

PRECISIONS = ("float32", "bfloat16", "int8")

# Layers whose weights autocast casts to bfloat16 in every forward pass; done once instead.
_CAST_ONCE = (nn.Linear, _ConvNd, nn.MultiheadAttention)


@dataclass(frozen=True)
class TeacherRuntime:
    """How the teacher runs. Nothing here changes the teacher itself, or its hash in checkpoints.

    All but `compile` alone run a copy: of about the teacher's size with 'float32', of half of it
    with 'bfloat16', of a quarter with 'int8'. None of it gives the teacher's exact logits; the
    how-to page has speed and distortion of each.
    """

    precision: Literal["float32", "bfloat16", "int8"] = field(
        default="float32",
        metadata=option(
            "'float32' leaves the dtypes as they are; 'bfloat16' holds the weights of linear and "
            "convolution layers in bfloat16 and runs under autocast; 'int8' stores weights as "
            "int8, one scale per channel, which saves memory and not time."
        ),
    )
    compile: bool = field(
        default=False,
        metadata=option(
            "Run it through torch.compile; takes a minute or more at the first batch, and again "
            "for other shapes. Where that fails, a warning and the teacher as it is."
        ),
    )
    channels_last: bool = field(
        default=False,
        metadata=option(
            "Convolution weights and images (N, C, H, W) in channels-last memory format; the "
            "model may not call view() on feature maps."
        ),
    )

    def __post_init__(self) -> None:
        owner = type(self).__name__
        require_choice(owner, "precision", self.precision, PRECISIONS)
        require_type(owner, "compile", self.compile, bool)
        require_type(owner, "channels_last", self.channels_last, bool)


def running_teacher(model: nn.Module, runtime: TeacherRuntime) -> nn.Module:
    """Return a module to call in place of `model`, which stays as it is.

    The defaults return `model` itself. Else the result is in eval mode, takes what the model
    takes, and returns what it returns, with bfloat16 tensors as float32. Its `model` is the model
    that really runs, with the original's names; hooks on it must be there before the first call if
    it is compiled.

    Args:
        model: the trained teacher.
        runtime: how it runs.

    Raises:
        QuantizationError: the model cannot be copied.
    """
    if runtime == TeacherRuntime():
        return model
    if runtime.precision == "int8":
        model = with_int8_weights(model)
    elif runtime.precision == "bfloat16" or runtime.channels_last:
        model = copy_model(model, keep_user_hooks=True)
    if runtime.precision == "bfloat16":
        _cast_weights(model)
    if runtime.channels_last:
        _reorder_weights(model)
    return RunningTeacher(model, runtime)


def slower_than_float32(model: nn.Module, runtime: TeacherRuntime) -> str:
    """Return in words why the runtime costs time on the model's device, or nothing."""
    parameter = next(model.parameters(), None)
    on_cpu = parameter is not None and parameter.device.type == "cpu"
    if runtime.precision == "bfloat16" and on_cpu and not _cpu_computes_bfloat16():
        return (
            "teacher_runtime: this processor has no bfloat16 instructions; emulating them takes "
            "several times float32's time, for half of the memory"
        )
    return ""


def _cpu_computes_bfloat16() -> bool:
    # No public function says it; torch's own compiler asks this one.
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class RunningTeacher(nn.Module):
    """Calls a model as `TeacherRuntime` says; made by `running_teacher`.

    Args:
        model: already converted.
        runtime: how to call it.
        backend: of torch.compile.
    """

    def __init__(
        self, model: nn.Module, runtime: TeacherRuntime, *, backend: str = "inductor"
    ) -> None:
        super().__init__()
        self.model = model
        self.runtime = runtime
        self.backend = backend
        self._compiled: Callable[..., Any] | None = None
        self._compile_failed = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output, in float32 where it is bfloat16."""
        if self.runtime.channels_last:
            args, kwargs = tree_map(_channels_last, (args, kwargs))
        try:
            if self.runtime.compile and not self._compile_failed:
                return self._call_compiled(args, kwargs)
            return self._call(args, kwargs)
        except Exception as error:
            error.add_note(
                f"The teacher ran with {self.runtime}, which changes dtypes or memory formats "
                "inside of it; leave options out to find the one that it does not stand."
            )
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what torch.compile returned, which calls this object and not its copy."""
        return {**self.__dict__, "_compiled": None}

    def _call_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._compiled is None:
            print("teacher: compiling at the first batch ...", file=sys.stderr, flush=True)
            self._compiled = torch.compile(self._call, backend=self.backend)
        try:
            return self._compiled(args, kwargs)
        except Exception as error:
            # An error that the model raises without the compiler, too, is not the compiler's.
            output = self._call(args, kwargs)
            self._compile_failed = True
            warnings.warn(
                "TeacherRuntime.compile: the teacher runs without torch.compile, which failed: "
                f"{_summary(error)}",
                stacklevel=2,
            )
            return output

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.runtime.precision != "bfloat16":
            return self.model(*args, **kwargs)
        with torch.autocast(_device_type(args, kwargs), torch.bfloat16):
            output = self.model(*args, **kwargs)
        return tree_map(_to_float32, output)


def _cast_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _CAST_ONCE):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()


def _reorder_weights(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = _channels_last(parameter.data)


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _to_float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        return value.float()
    return value


def _device_type(*inputs: Any) -> str:
    devices = [tensor.device.type for tensor in tensors_in(inputs)]
    return next((kind for kind in devices if kind != "cpu"), "cpu")


def _summary(error: Exception) -> str:
    # The first line of the compiler's errors only says which backend it was.
    return " ".join([f"{type(error).__name__}:", *str(error).split("\n")[:2]])
