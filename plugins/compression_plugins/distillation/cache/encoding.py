"""How one teacher output is stored: all classes or the most likely ones, and with how many bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression_manager.configuration.checks import require_choice, require_integer
from compression_manager.errors import ConfigError

OWNER = "TeacherCache"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}

_STEPS = 255
_LOWEST = -128
_PARAMETER_BYTES = 4 + 4  # scale and offset, float32
_TAIL_BYTES = 4


@dataclass(frozen=True)
class Encoding:
    """From logits (batch, *, classes) to the tensors that are stored, and back.

    Attributes:
        top_k: how many of the largest logits are kept, or None for all.
        dtype: 'float32', 'float16' or 'int8', of the kept logits.
    """

    top_k: int | None
    dtype: str

    def __post_init__(self) -> None:
        if self.top_k is not None:
            require_integer(OWNER, "top_k", self.top_k, minimum=1)
        require_choice(OWNER, "dtype", self.dtype, DTYPES)

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors, each with the batch first.

        Args:
            logits: (batch, *, classes) finite float.

        Raises:
            ConfigError: `top_k` leaves no class out, or is to be taken of images; or a logit does
                not fit float16.
        """
        logits = logits.float()
        if self.top_k is None:
            return self._encode_values(logits)
        if logits.dim() > 3:
            raise ConfigError(
                f"{OWNER}.top_k keeps the largest logits of the last dimension, which hardly holds "
                f"the classes of logits of shape {tuple(logits.shape)}; leave it out to keep all."
            )
        classes = logits.shape[-1]
        if self.top_k >= classes:
            raise ConfigError(
                f"{OWNER}.top_k is {self.top_k}, but the teacher predicts {classes} classes, so "
                "that none is left out; leave top_k out to keep all."
            )
        values, indices = logits.topk(self.top_k, dim=-1)
        rest = logits.double().scatter(-1, indices, -math.inf).logsumexp(-1)
        return {
            **self._encode_values(values),
            "indices": indices.to(_index_dtype(classes)),
            "tail": (rest - math.log(classes - self.top_k)).float(),
        }

    def decode(self, parts: Mapping[str, Tensor], classes: int) -> Tensor:
        """Return float32 logits (batch, *, classes) of what `encode` returned.

        Of a top-k row, every class that was left out gets the logit `tail`.
        """
        values = self.decode_values(parts)
        if self.top_k is None:
            return values
        tail = parts["tail"].unsqueeze(-1)
        logits = tail.expand(*tail.shape[:-1], classes).contiguous()
        return logits.scatter_(-1, parts["indices"].long(), values)

    def decode_values(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the kept logits alone, float32; the largest first if there is a `top_k`."""
        if self.dtype == "int8":
            steps = parts["values"].float().sub_(_LOWEST)
            return steps.mul_(parts["scale"]).add_(parts["offset"])
        return parts["values"].float()

    @property
    def stored_as(self) -> str:
        """What files call `dtype`; earlier releases wrote int8 otherwise."""
        return "int8 with an offset" if self.dtype == "int8" else self.dtype

    def bytes_per_sample(self, shape: Sequence[int]) -> int:
        """Return what one output of shape (*, classes) takes."""
        *positions, classes = shape
        kept = classes if self.top_k is None else self.top_k
        size = kept * DTYPES[self.dtype].itemsize
        if self.top_k is not None:
            size += kept * _index_dtype(classes).itemsize + _TAIL_BYTES
        if self.dtype == "int8":
            size += _PARAMETER_BYTES
        return math.prod(positions) * size

    def __str__(self) -> str:
        top_k = "" if self.top_k is None else f"top_k={self.top_k}, "
        return f"{top_k}dtype={self.dtype!r}"

    def _encode_values(self, values: Tensor) -> dict[str, Tensor]:
        if self.dtype == "int8":
            return _in_steps(values)
        stored = values.to(DTYPES[self.dtype])
        if not bool(stored.isfinite().all()):
            raise ConfigError(
                f"{OWNER}.dtype is {self.dtype!r}, which ends at "
                f"{torch.finfo(stored.dtype).max:g}, but the teacher's logits reach "
                f"{values.abs().max().item():g}"
                + ("; use 'float32' or 'int8'." if self.dtype == "float16" else ".")
            )
        return {"values": stored}


def _in_steps(values: Tensor) -> dict[str, Tensor]:
    """Return the 256 steps over the range of each row, which need not contain zero.

    The logits of a language model's likeliest tokens are far from it, and close to one another.
    """
    low, high = values.double().aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / _STEPS).float()
    step = scale.double().clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((values.double() - low) / step).round_().clamp_(0, _STEPS) + _LOWEST
    return {"values": codes.to(torch.int8), "scale": scale, "offset": low.float()}


def _index_dtype(classes: int) -> torch.dtype:
    return torch.int16 if classes - 1 <= torch.iinfo(torch.int16).max else torch.int32
