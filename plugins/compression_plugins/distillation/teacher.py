"""The teacher: frozen, in eval mode, without gradient, and restored at close."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.context import Context
from compression_manager.errors import ConfigError
from compression_manager.model_call import call_model, tensors_in, without_labels


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

    def freeze(self, context: Context, owner: str) -> None:
        """Switch to eval mode and stop gradients until the manager closes."""
        modes = [(module, module.training) for module in self.model.modules()]
        gradients = [(p, p.requires_grad) for p in self.model.parameters()]

        def restore() -> None:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad in gradients:
                parameter.requires_grad_(requires_grad)

        context.add_cleanup(restore, owner=owner)
        self.model.eval()
        self.model.requires_grad_(False)

    def run(self, inputs: Any) -> Any:
        """Return the teacher's output for the student's inputs.

        Moves the teacher to the inputs' device first; whatever `train()` was called on, it runs
        in eval mode.
        """
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        self._follow_device(inputs)
        with torch.no_grad():
            if self._forward is not None:
                return self._forward(self.model, inputs)
            return call_model(self.model, without_labels(inputs))

    def weights_hash(self) -> str:
        """Return the SHA-256 of names, shapes, dtypes and bytes of the teacher's tensors."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            if isinstance(value, Tensor):
                plain = value.detach().cpu().contiguous()
                digest.update(f"{tuple(plain.shape)}{plain.dtype}".encode())
                digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _follow_device(self, inputs: Any) -> None:
        own = next(
            iter(tensors_in((list(self.model.parameters()), list(self.model.buffers())))), None
        )
        given = next(tensors_in(inputs), None)
        if own is not None and given is not None and own.device != given.device:
            self.model.to(given.device)


def check_distinct(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ConfigError if the teacher is the student or trains the same parameters."""
    if any(module is student for module in teacher.modules()) or any(
        module is teacher for module in student.modules()
    ):
        raise ConfigError(
            "the teacher is the student itself or a part of it; pass a separate model, for example "
            "copy.deepcopy(model)."
        )
    own = {id(parameter): name for name, parameter in student.named_parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in own and parameter.requires_grad:
            raise ConfigError(
                f"the teacher shares the trainable parameter '{name}' with the student's "
                f"'{own[id(parameter)]}', and freezing the teacher would freeze it; pass a "
                "separate copy."
            )
