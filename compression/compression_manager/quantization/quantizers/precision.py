"""Ranges and scales stay float32, whatever the model around them is converted to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose own float32 buffers survive `.half()`, `.bfloat16()` and `.double()`.

    Moving to another device works as usual.
    """

    def _stays_float32(self, name: str) -> bool:
        """Return whether the buffer `name` is not to be cast; a subclass may exempt some."""
        return True

    def _buffer(self, name: str) -> Tensor:
        """Return a buffer, for what small layers do in every step.

        An attribute of that name is looked for in the class and all its bases first, which takes as
        long as an operator.
        """
        return cast(Tensor, self._buffers[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # nn.Module replaces its buffers here; a later cast back would have lost the digits.
        before: dict[str, Any] = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.dtype == torch.float32 and self._stays_float32(name)
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != torch.float32:
                self._buffers[name] = buffer.to(after.device)
        return self
