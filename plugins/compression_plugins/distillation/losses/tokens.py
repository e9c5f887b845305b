"""Losses on the logits of sequence models: means over the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor

from compression_manager.errors import ConfigError
from compression_plugins.distillation.losses.chunked import chunked_divergence
from compression_plugins.distillation.losses.common import (
    Temperature,
    check_label_smoothing,
    check_logits,
    checked_temperature,
)
from compression_plugins.distillation.losses.distributions import (
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    log_probabilities,
)
from compression_plugins.distillation.losses.divergences import check_beta


def token_kl_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    *,
    num_items: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Return sum over tokens with mask 1 of T^2 * KL(p || softmax(student / T)) / num_items.

    p is the smoothed teacher of `kd_loss`. Source: Hinton et al. 2015, "Distilling the Knowledge
    in a Neural Network", section 2, at each token, as Sanh et al. 2019 do in "DistilBERT".

    Micro-batches of an accumulated batch add up to the loss of the whole batch when each gets
    `num_items` = the number of counted tokens of the whole. Padding changes nothing: what is
    masked out may hold any value, and gets the gradient 0. A causal model's mask leaves out the
    positions whose next token is padding; nothing is shifted here.

    With `chunk_size` the loss is computed over that many classes at a time. Beside the logits and
    the student's gradient it then needs memory for a few slices (tokens * chunk_size) only; it can
    be differentiated once, and `create_graph=True` raises ConfigError. Measured on the CPU for 256
    tokens and 32,768 classes in float32 (32 MiB) with chunk_size 1024 (1 MiB a slice): a peak of
    39 MiB, the gradient's 32 MiB included (reverse KL 40, Jensen-Shannon 41); all at once 160 MiB
    (160, 416).

    Args:
        student: (*, classes) float logits.
        teacher: same shape; no gradient flows into it.
        mask: (*) of 1 or True where a token counts and 0 or False where not; default: all count.
        temperature: positive; a number, or (*) with one per token (T^2 is then in the mean).
        num_items: the number of counted tokens to divide by: an integer above 0, or a tensor
            without dimensions, which is not checked, to spare the device a wait. Default: the sum
            of this mask, or 1 if that is 0.
        label_smoothing: from 0 to 1.
        chunk_size: classes per slice, 1 at least; default: all at once.

    Returns:
        Scalar, float32 at least; 0 where both distributions are equal or no token counts.

    Raises:
        ConfigError: the logits are empty, not floating-point or of different shapes; the mask has
            another shape or values than 0 and 1; a temperature is not a finite number above 0;
            num_items or chunk_size is not an integer above 0; the smoothing is not from 0 to 1.
    """
    check_label_smoothing(label_smoothing)
    check_logits(student, teacher)
    divergence = ForwardKL(student.shape[-1], label_smoothing)
    return _token_mean(student, teacher, divergence, mask, temperature, num_items, chunk_size)


def token_reverse_kl_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    *,
    num_items: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return sum over tokens with mask 1 of T^2 * KL(student || teacher) / num_items.

    Source: Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models", equation 1,
    at each token of given sequences. Arguments and errors as for `token_kl_loss`.
    """
    divergence = ReverseKL()
    return _token_mean(student, teacher, divergence, mask, temperature, num_items, chunk_size)


def token_jensen_shannon_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    temperature: Temperature = 1.0,
    *,
    beta: float = 0.5,
    num_items: int | Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return sum over tokens with mask 1 of T^2 * JSD(teacher, student) / num_items.

    JSD = beta KL(P || M) + (1 - beta) KL(Q || M) with the teacher's P, the student's Q and
    M = beta P + (1 - beta) Q. Source and limits: see `jensen_shannon_loss`. Other arguments and
    errors as for `token_kl_loss`.

    Args:
        beta: the teacher's share, between 0 and 1.
    """
    check_beta(beta)
    divergence = JensenShannon(beta)
    return _token_mean(student, teacher, divergence, mask, temperature, num_items, chunk_size)


def _token_mean(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    mask: Tensor | None,
    temperature: Temperature,
    num_items: int | Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    check_logits(student, teacher)
    counted = None if mask is None else _checked_mask(mask, student)
    count = _count(num_items, counted, student)
    if counted is not None and isinstance(temperature, Tensor):
        temperature = _outside_set_to_one(temperature, counted)
    if chunk_size is not None:
        _check_positive("chunk_size", chunk_size)
        temperature = checked_temperature(temperature, student)
        per_token = chunked_divergence(student, teacher, temperature, divergence, chunk_size)
    else:
        if counted is not None:
            # Before the softmax, whose gradient would spread a NaN of the padding.
            left_out = ~counted.unsqueeze(-1)
            student, teacher = (item.masked_fill(left_out, 0) for item in (student, teacher))
        *logs, temperature = log_probabilities(student, teacher, temperature)
        per_token = divergence.value(*logs)
    if counted is not None:
        per_token = per_token.masked_fill(~counted, 0)
    return (per_token * temperature**2).sum() / count


def _checked_mask(mask: Tensor, logits: Tensor) -> Tensor:
    if mask.shape != logits.shape[:-1]:
        raise ConfigError(
            f"mask has shape {tuple(mask.shape)}; the logits {tuple(logits.shape)} need one value "
            f"per token: {tuple(logits.shape[:-1])}."
        )
    counted = mask.bool()
    if mask.dtype != torch.bool and not (mask == counted).all():
        wrong = mask[mask != counted].flatten()[0].item()
        raise ConfigError(f"mask holds {wrong}; it must be 1 where a token counts, 0 elsewhere.")
    return counted


def _count(num_items: int | Tensor | None, counted: Tensor | None, logits: Tensor) -> int | Tensor:
    if num_items is None:
        if counted is None:
            return logits[..., 0].numel()
        return counted.sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        if num_items.ndim != 0:
            raise ConfigError(
                f"num_items has shape {tuple(num_items.shape)}; it must be one number: the counted "
                "tokens of the whole accumulated batch."
            )
        return num_items.detach()
    _check_positive("num_items", num_items)
    return num_items


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer above 0, got {value!r}.")


def _outside_set_to_one(temperature: Tensor, counted: Tensor) -> Tensor:
    """Replace what padding has for a temperature; another shape is refused later."""
    if temperature.shape != counted.shape:
        return temperature
    return temperature.masked_fill(~counted, 1)
