"""Checks of arguments, promotion to float32, and arithmetic that stays finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compression_manager.errors import ConfigError

# One for all positions, or one per position.
Temperature = float | Tensor


def promoted(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one dtype, float32 at least; the teacher without gradient."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits that are no pair of equal shape (*, classes)."""
    _check_floating(student, teacher, "logits")
    if student.shape != teacher.shape:
        raise ConfigError(
            f"student logits have shape {tuple(student.shape)}, teacher logits "
            f"{tuple(teacher.shape)}; both must be equal, with the classes last."
        )
    if student.ndim == 0:
        raise ConfigError("logits must be (*, classes), got a scalar.")


def check_same_features(student: Tensor, teacher: Tensor) -> None:
    """Refuse features of different shapes."""
    _check_floating(student, teacher, "features")
    if student.shape != teacher.shape:
        raise ConfigError(
            f"student features have shape {tuple(student.shape)}, teacher features "
            f"{tuple(teacher.shape)}; both must be equal. A projection can match them."
        )


def check_same_samples(student: Tensor, teacher: Tensor) -> None:
    """Refuse features that are not (N, *) with the same N and at least one value per sample."""
    _check_floating(student, teacher, "features")
    for name, features in (("student", student), ("teacher", teacher)):
        if features.ndim < 2:
            raise ConfigError(
                f"{name} features have shape {tuple(features.shape)}; they must be (N, *) with "
                "the samples first."
            )
    if len(student) != len(teacher):
        raise ConfigError(
            f"student features hold {len(student)} samples (shape {tuple(student.shape)}), "
            f"teacher features {len(teacher)} (shape {tuple(teacher.shape)}); both must be equal."
        )


def checked_temperature(temperature: Temperature, logits: Tensor) -> Temperature:
    """Return a temperature that is valid for logits (*, classes): a number, or (*).

    Reading the values of a tensor makes the host wait for the device once.
    """
    if not isinstance(temperature, Tensor):
        check_one_temperature(temperature)
        return temperature
    if temperature.shape != logits.shape[:-1]:
        raise ConfigError(
            f"temperature has shape {tuple(temperature.shape)}; it must be a number, or a tensor "
            f"with one value per position: {tuple(logits.shape[:-1])}."
        )
    valid = (temperature > 0) & temperature.isfinite()
    if not valid.all():
        wrong = temperature[~valid].flatten()[0].item()
        raise ConfigError(f"temperature must be a finite number above 0, got {wrong}.")
    # Logits of half precision are widened before they are divided; the temperature is not narrowed.
    return temperature.detach().to(torch.promote_types(logits.dtype, torch.float32))


def check_one_temperature(temperature: float) -> None:
    """Refuse anything but a finite number above 0."""
    if isinstance(temperature, Tensor):
        raise ConfigError(
            "the temperature has a value for each position; this loss compares samples with one "
            "another, so that it must be one number for all, which AdaptiveSchedule is not."
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature must be a finite number above 0, got {temperature}.")


def check_label_smoothing(label_smoothing: float) -> None:
    """Refuse anything but 0 to 1."""
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(f"label_smoothing must be from 0 to 1, got {label_smoothing}.")


def per_class(temperature: Temperature) -> Temperature:
    """Return a temperature that logits can be divided by."""
    return temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature


def batch_mean(per_position: Tensor, temperature: Temperature) -> Tensor:
    """Return the mean over positions of temperature^2 times the values (*)."""
    if isinstance(temperature, Tensor):
        return (per_position * temperature**2).mean()
    return per_position.mean() * temperature**2


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return the product in the dtype of its factors, whatever autocast is active."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def magnitude(vectors: Tensor) -> Tensor:
    """Return the power of two below max|x| of the last dimension, kept with size 1. A constant.

    A loss that does not depend on the scale of its vectors may divide by it without changing its
    gradient; then squares neither overflow nor vanish. The quotients, whose largest is from 1 to 2,
    are exact: those by the largest value itself would round away what little tells vectors far
    from the origin apart. Vectors of zeros have 1.
    """
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest < torch.finfo(vectors.dtype).tiny, 1)
    return largest / (2 * torch.frexp(largest).mantissa)


def unit(vectors: Tensor) -> Tensor:
    """Divide vectors (*, D) by their L2 norm; zero stays zero, with gradient zero."""
    scaled = vectors / magnitude(vectors)
    squares = scaled.square().sum(-1, keepdim=True)
    # A scaled vector that is not zero has a square sum of at least 1.
    is_zero = squares.detach() < 0.5
    return (scaled / squares.masked_fill(is_zero, 1).sqrt()).masked_fill(is_zero, 0)


def _check_floating(student: Tensor, teacher: Tensor, what: str) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not tensor.is_floating_point():
            raise ConfigError(f"{name} {what} are {tensor.dtype}; they must be floating-point.")
        if tensor.numel() == 0:
            raise ConfigError(f"{name} {what} are empty: shape {tuple(tensor.shape)}.")
