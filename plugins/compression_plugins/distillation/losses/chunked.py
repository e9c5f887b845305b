"""A divergence of large vocabularies, computed slice by slice of the classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compression_manager.errors import ConfigError
from compression_manager.quantization.autograd import apply
from compression_plugins.distillation.losses.common import Temperature, per_class
from compression_plugins.distillation.losses.distributions import Divergence


def chunked_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: Temperature,
    divergence: Divergence,
    chunk_size: int,
) -> Tensor:
    """Return (*) divergences between logits (*, classes); extra memory O(positions * chunk_size).

    Backward computes the slices again and adds the one buffer of the student's gradient. It
    cannot be differentiated once more: `create_graph=True` raises ConfigError.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return apply(
        _ChunkedDivergence, student, teacher.detach(), temperature, divergence, chunk_size, dtype
    )


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: Temperature,
        divergence: Divergence,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        slices = _Slices(per_class(temperature), chunk_size, dtype)
        of_student, of_teacher = slices.normalizer(student), slices.normalizer(teacher)
        value = student.new_zeros(student.shape[:-1], dtype=dtype)
        total_slope = torch.zeros_like(value)
        for student_slice, teacher_slice in zip(slices(student), slices(teacher), strict=True):
            log_student = _log_softmax(student_slice, of_student)
            log_teacher = _log_softmax(teacher_slice, of_teacher)
            # Not in place: compiled by torch 2.11, what is returned then has a gradient of zero.
            value = value + divergence.value(log_student, log_teacher)
            total_slope = total_slope + divergence.slope(log_student, log_teacher).sum(-1)
        context.save_for_backward(student, teacher, *of_student, *of_teacher, total_slope)
        context.slices, context.divergence = slices, divergence
        return value

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the slices would count as constants.
            raise ConfigError(
                "a loss with chunk_size cannot be differentiated twice (create_graph=True); leave "
                "chunk_size out."
            )
        student, teacher, *normalizers, total_slope = context.saved_tensors
        of_student, of_teacher = tuple(normalizers[:2]), tuple(normalizers[2:])
        slices, divergence = context.slices, context.divergence
        factor = gradient.unsqueeze(-1) / slices.divisor
        is_left_out = gradient.unsqueeze(-1) == 0  # Its logits may be anything, even NaN.
        result = torch.empty_like(student)
        pairs = zip(slices(student), slices(teacher), slices.views(result), strict=True)
        for student_slice, teacher_slice, result_slice in pairs:
            log_student = _log_softmax(student_slice, of_student)
            slope = divergence.slope(log_student, _log_softmax(teacher_slice, of_teacher))
            # The derivative of softmax turns s * d(value)/ds into that of the logits.
            slope = slope.addcmul(log_student.exp(), total_slope.unsqueeze(-1), value=-1)
            result_slice.copy_((slope * factor).masked_fill(is_left_out, 0))
        return result, None, None, None, None, None


class _Slices:
    """Slices of logits over the classes, divided by the temperature, in the dtype of the loss."""

    def __init__(self, divisor: Temperature, chunk_size: int, dtype: torch.dtype) -> None:
        self.divisor = divisor
        self.chunk_size = chunk_size
        self.dtype = dtype

    def __call__(self, logits: Tensor) -> Iterator[Tensor]:
        for part in self.views(logits):
            yield part.to(self.dtype) / self.divisor

    def views(self, logits: Tensor) -> tuple[Tensor, ...]:
        return torch.split(logits, self.chunk_size, -1)

    def normalizer(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maximum and log(sum(exp(logits - maximum))), each (*, 1).

        Apart, because their sum would round away the logarithm next to large logits.
        """
        maximum = logits.new_full((*logits.shape[:-1], 1), -torch.inf, dtype=self.dtype)
        total = torch.zeros_like(maximum)
        for part in self(logits):
            raised = torch.maximum(maximum, part.amax(-1, keepdim=True))
            total = total * (maximum - raised).exp() + (part - raised).exp().sum(-1, keepdim=True)
            maximum = raised
        return maximum, total.log()


def _log_softmax(logits: Tensor, normalizer: tuple[Tensor, ...]) -> Tensor:
    maximum, log_total = normalizer
    return logits - maximum - log_total
