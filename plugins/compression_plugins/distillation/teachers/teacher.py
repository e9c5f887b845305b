"""The teacher: frozen, in eval mode, without gradient, and restored at close."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.context import Context
from compression_manager.errors import CompressionError, ConfigError
from compression_manager.models.calling import call_model, tensors_in, without_labels
from compression_manager.models.held_attributes import hold


class Teacher:
    """Runs a teacher as the student was run; it is no part of the student.

    Args:
        model: the trained teacher.
        forward: `forward(model, inputs)`, or None to call the model as the loop calls the
            student: a mapping by keyword without labels, a tuple by position, else directly.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[[nn.Module, Any], Any] | None = None
    ) -> None:
        self.model = model
        self._forward = forward
        self._shared: list[nn.Module] = []
        self._has_answered = False

    def freeze(self, context: Context, owner: str) -> None:
        """Switch to eval mode and stop gradients until the manager closes."""
        students = {id(module) for module in context.model.modules()}
        self._shared = [module for module in self.model.modules() if id(module) in students]
        modes = [(item, "training") for item in self.model.modules() if id(item) not in students]
        # By name: moving between some kinds of devices replaces the Parameters.
        gradients = [
            (module, f"{name}.requires_grad")
            for module in self.model.modules()
            for name, _ in module.named_parameters(recurse=False)
        ]
        context.add_cleanup(hold([*modes, *gradients]), owner=owner)
        with self._in_eval_mode():
            self.model.requires_grad_(False)

    def run(self, inputs: Any) -> Any:
        """Return the teacher's output for the student's inputs.

        Moves the teacher to the inputs' device first; whatever `train()` was called on, it runs
        in eval mode.

        Raises:
            ConfigError: the first call fails.
        """
        self._follow_device(inputs)
        with self._in_eval_mode(), torch.no_grad():
            if self._forward is not None:
                return self._forward(self.model, inputs)
            return self._called(without_labels(inputs))

    def _called(self, inputs: Any) -> Any:
        try:
            output = call_model(self.model, inputs)
        except CompressionError:
            raise
        except Exception as error:
            if self._has_answered:
                raise
            raise ConfigError(
                f"the teacher cannot be called with these inputs ({error!r}). If it takes them in "
                "another form than the student, wrap it in a module that converts them, or pass "
                "DistillationConfig(teacher_forward=...), a function of the teacher and the inputs."
            ) from error
        self._has_answered = True
        return output

    @contextmanager
    def _in_eval_mode(self) -> Iterator[None]:
        # Activations without state may be one object in both models; the student keeps its mode.
        modes = [(module, module.training) for module in self._shared]
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _follow_device(self, inputs: Any) -> None:
        own, given = next(_weights(self.model), None), main_device(inputs)
        if own is None or given is None or own.device == given:
            return
        # A teacher that its owner spread over several devices stays where it is.
        if all(tensor.device == own.device for tensor in _weights(self.model)):
            self.model.to(given)


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of names, shapes, dtypes and bytes of a model's tensors."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{tuple(plain.shape)}{plain.dtype}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_distinct(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ConfigError if training the student would train or switch parts of the teacher."""
    students = {id(module): name for name, module in student.named_modules()}
    for name, module in teacher.named_modules():
        if module is student or (module is teacher and id(module) in students):
            raise ConfigError(
                "the teacher is the student itself, a part of it or a model around it; pass a "
                "separate model, for example copy.deepcopy(model)."
            )
        if id(module) in students and any(True for _ in _weights(module)):
            raise ConfigError(
                f"the teacher's module '{name}' is also the student's '{students[id(module)]}', "
                "so that training would change the teacher; pass a separate copy."
            )
    trained = {_memory(p): name for name, p in student.named_parameters() if p.requires_grad}
    for name, parameter in teacher.named_parameters():
        if _memory(parameter) in trained:
            raise ConfigError(
                f"the teacher's parameter '{name}' is the student's trainable "
                f"'{trained[_memory(parameter)]}', so that training would change the teacher; "
                "pass a separate copy."
            )


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    """Return what two parameters have in common when they are views of the same memory.

    `load_state_dict(..., assign=True)` makes such parameters. Other kinds of parameters (lazy,
    sharded, without data) have no address.
    """
    address = tensor.untyped_storage().data_ptr() if type(tensor) is nn.Parameter else 0
    return tensor.device, address or id(tensor)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def main_device(inputs: Any) -> torch.device | None:
    """Return the accelerator on which any of the inputs lies, else the CPU if there are inputs."""
    devices = [tensor.device for tensor in tensors_in(inputs)]
    accelerators = [device for device in devices if device.type != "cpu"]
    return next(iter(accelerators or devices), None)
