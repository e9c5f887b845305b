"""Rounding real numbers to integers with plain torch operations, and finding what was clipped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compression_manager.quantization.integer.bits import MANY, no_bits, pack_nonzero
from compression_manager.quantization.integer.parts import parts

# Few elements of a large tensor are clipped as a rule, and only where a code is at an end. Runs of
# codes are searched for such ends, and only the elements of those that have one are looked at.
_RUN = 256
# Bytes of the bits of a run.
_BYTES = _RUN // 8
# Added to a float32 below 2^22, it leaves no bits for fractions: half is rounded to even.
_ROUND = 1.5 * 2.0**23


class Rounding(NamedTuple):
    """The integers to which real numbers are rounded; attributes as for `Passes.quantize`."""

    inverse_scale: float | Tensor
    zero_point: int | Tensor
    quant_min: int
    quant_max: int

    def round(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the integers as float32, clipped nowhere."""
        return torch.mul(values, self.inverse_scale, out=out).round_().add_(self.zero_point)

    def write(self, values: Tensor, codes: Tensor, space: Tensor, *, clips: bool) -> None:
        """Write the integers of `values` to `codes`, all of them inside of the range.

        Args:
            values: float32 (n,).
            codes: uint8 or int8 (n,).
            space: float32 (n,), to compute in.
            clips: whether an integer may be outside of the range.
        """
        steps = self.round(values, out=space)
        codes.copy_(steps.clamp_(self.quant_min, self.quant_max) if clips else steps)

    def write_bytes(self, values: Tensor, codes: Tensor, space: Tensor, *, clips: bool) -> None:
        """Do what `write` does, by the bytes of float32: torch makes uint8 of it one by one."""
        assert isinstance(self.zero_point, int)  # a CPU is not waited for
        steps = torch.mul(values, self.inverse_scale, out=space)
        if clips:
            steps.clamp_(self.quant_min - self.zero_point, self.quant_max - self.zero_point)
        # The sum has no bits for fractions, and the integer in its lowest byte, which is kept.
        codes.copy_(steps.add_(_ROUND).view(torch.int32))
        if self.zero_point:
            codes.add_(self.zero_point)

    def pack_clipped(self, values: Tensor) -> Tensor:
        """Return a bit for each value, which is 1 if its integer is outside of the range."""
        steps = self.round(values)
        return pack_nonzero(steps - steps.clamp(self.quant_min, self.quant_max))

    def find_clipped(self, flat: Tensor, codes: Tensor, *, below: bool, above: bool) -> Tensor:
        """Return the bits of `flat`, whose clipped integers are `codes`; both (n,)."""
        if flat.device.type == "cpu" and flat.numel() >= MANY:
            found = self._runs_at_an_end(codes, below=below, above=above)
            if len(found) * _RUN < flat.numel() // 4:
                return self._pack_found(flat, found)
        return torch.cat([self.pack_clipped(flat[part]) for part in parts(flat)])

    def _runs_at_an_end(self, codes: Tensor, *, below: bool, above: bool) -> Tensor:
        """Return the numbers of the full runs in which a code is the smallest, or the largest.

        Half of what a ReLU returned is the smallest, so that an end is looked for only if need be.
        """
        runs = codes[: len(codes) // _RUN * _RUN].view(-1, _RUN)
        at_end = runs.new_zeros(len(runs), dtype=torch.bool)
        if below:
            at_end |= runs.amin(1) == self.quant_min
        if above:
            at_end |= runs.amax(1) == self.quant_max
        return at_end.nonzero().squeeze(1)

    def _pack_found(self, flat: Tensor, found: Tensor) -> Tensor:
        """Return the bits of `flat`, of whose full runs no others can have any.

        The elements behind the last full run are always looked at.
        """
        bits = no_bits(flat)
        whole = len(flat) // _RUN * _RUN
        clipped = self.pack_clipped(flat[:whole].view(-1, _RUN).index_select(0, found))
        bits[: whole // 8].view(-1, _BYTES).index_copy_(0, found, clipped.view(-1, _BYTES))
        bits[whole // 8 :] = self.pack_clipped(flat[whole:])
        return bits
