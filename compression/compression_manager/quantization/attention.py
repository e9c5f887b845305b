"""Multi-head attention between its projections, for layers that compute those themselves.

The formula is that of Vaswani et al. 2017 (arXiv:1706.03762), section 3.2; masks, extra keys and
the order of operations are those of `torch.nn.MultiheadAttention`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.errors import QuantizationError


@dataclass(frozen=True)
class AttentionCall:
    """How one call of attention treats its projected inputs.

    Attributes:
        num_heads: number of heads, a divisor of the embedding dimension E.
        mask: float, broadcastable to (N, num_heads, L, S), added to the scores; or None.
        is_causal: query i attends to keys 0 to i; only with need_weights False and no mask.
        need_weights: whether the attention weights are returned.
        average_weights: whether these are averaged over the heads.
        dropout: probability with which an attention weight is zeroed.
    """

    num_heads: int
    mask: Tensor | None
    is_causal: bool
    need_weights: bool
    average_weights: bool
    dropout: float


def attend(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(query keyᵀ / sqrt(E / num_heads) + mask) value, for each head.

    Args:
        query: (L, N, E), projected.
        key: (S, N, E), projected.
        value: (S, N, E), projected.

    Returns:
        output: (L, N, E), before the output projection.
        weights: (N, L, S), or (N, num_heads, L, S) unless averaged; None unless needed.
    """
    length, batch, width = query.shape
    q, k, v = (_split_heads(item, call.num_heads) for item in (query, key, value))
    weights = None
    if call.need_weights:
        scores = (q * math.sqrt(call.num_heads / width)) @ k.transpose(-2, -1)
        scores = scores if call.mask is None else scores + call.mask
        weights = F.dropout(scores.softmax(-1), call.dropout)
        heads = weights @ v
        weights = weights.mean(1) if call.average_weights else weights
    else:
        heads = F.scaled_dot_product_attention(
            q, k, v, call.mask, call.dropout, is_causal=call.is_causal
        )
    return heads.permute(2, 0, 1, 3).reshape(length, batch, width), weights


def _split_heads(projected: Tensor, num_heads: int) -> Tensor:
    """Return (N, num_heads, length, E / num_heads) from (length, N, E)."""
    length, batch, width = projected.shape
    return projected.reshape(length, batch, num_heads, width // num_heads).permute(1, 2, 0, 3)


class ProjectedAttention(nn.Module):
    """The forward pass of `nn.MultiheadAttention` with projections of the subclass's own.

    Never takes torch's fused path, which reads the float weights.
    """

    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: Tensor | None
    bias_v: Tensor | None

    @abstractmethod
    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projections, each (..., embed_dim) for an input (..., its width)."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output and, if needed, its weights; as `nn.MultiheadAttention`.

        Args:
            query: (L, N, embed_dim), (N, L, embed_dim) with batch_first, or (L, embed_dim).
            key: (S, N, kdim), (N, S, kdim) with batch_first, or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) with batch_first, or (S, vdim).
            key_padding_mask: (N, S) or (S,), bool (True is left out) or float (is added).
            need_weights: whether to return the attention weights as well.
            attn_mask: (L, S) or (N * num_heads, L, S), bool or float as above.
            average_attn_weights: whether the weights returned are averaged over the heads.
            is_causal: says that `attn_mask` is the causal mask, which may then be left unread.

        Raises:
            QuantizationError: nested tensors, a mask that does not fit, or is_causal without
                attn_mask.
        """
        if any(item.is_nested for item in (query, key, value)):
            raise QuantizationError("quantized MultiheadAttention takes no nested tensors.")
        batched = query.dim() == 3
        # In the layout of the caller: what a quantizer takes for samples lies in dimension 0.
        q, k, v = (self._length_first(item, batched) for item in self.project(query, key, value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._merge_masks(q, k, attn_mask, key_padding_mask, is_causal, causal)
        k, v, mask = self._add_keys(k, v, mask)
        call = AttentionCall(
            self.num_heads,
            mask,
            causal,
            need_weights,
            average_attn_weights,
            self.dropout if self.training else 0.0,
        )
        attended, weights = attend(q, k, v, call)
        if not batched:
            attended, weights = attended.squeeze(1), None if weights is None else weights.squeeze(0)
        elif self.batch_first:
            attended = attended.transpose(0, 1)
        return cast(Tensor, self.get_submodule("out_proj")(attended)), weights

    def _length_first(self, input: Tensor, batched: bool) -> Tensor:
        if not batched:
            return input.unsqueeze(1)
        return input.transpose(0, 1) if self.batch_first else input

    def _merge_masks(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        causal: bool,
    ) -> Tensor | None:
        """Return one float mask that broadcasts to (N, num_heads, L, S), or None."""
        length, batch, _ = query.shape
        if is_causal and attn_mask is None:
            raise QuantizationError("is_causal=True is a hint about attn_mask, which is missing.")
        merged = None
        if attn_mask is not None and not causal:
            merged = _additive("attn_mask", attn_mask, query.dtype)
            if merged.dim() == 3:
                _check_shape("attn_mask", merged, (batch * self.num_heads, length, key.shape[0]))
                merged = merged.reshape(batch, self.num_heads, length, key.shape[0])
            else:
                _check_shape("attn_mask", merged, (length, key.shape[0]))
        if key_padding_mask is not None:
            _check_shape("key_padding_mask", key_padding_mask, (batch, key.shape[0]))
            padding = _additive("key_padding_mask", key_padding_mask, query.dtype)
            padding = padding[:, None, None]
            merged = padding if merged is None else merged + padding
        return merged

    def _add_keys(
        self, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the learned and the zero key and value, which no mask leaves out."""
        batch = key.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.expand(1, batch, -1)])
            value = torch.cat([value, self.bias_v.expand(1, batch, -1)])
            mask = None if mask is None else F.pad(mask, (0, 1))
        if self.add_zero_attn:
            key, value = (F.pad(item, (0, 0, 0, 0, 0, 1)) for item in (key, value))
            mask = None if mask is None else F.pad(mask, (0, 1))
        return key, value, mask


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as numbers to add: minus infinity where a bool mask is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise QuantizationError(f"{name} of attention is bool or float, got {mask.dtype}.")
    return mask


def _check_shape(name: str, mask: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(mask.shape) != expected:
        raise QuantizationError(
            f"{name} of attention has shape {tuple(mask.shape)}, expected {expected}."
        )
