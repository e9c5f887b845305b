"""The range with which quantizing changes values least, in squares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compression_manager.quantization.arithmetic.parameters import compute_qparams
from compression_manager.quantization.observers.bins import Layout
from compression_manager.quantization.scheme import QuantizationScheme

# (candidates, rows) of minima and of maxima -> (candidates, rows) of errors, on any scale.
ErrorFunction = Callable[[Tensor, Tensor], Tensor]

# How far an end of the range is drawn in: factors of 2^-0 to 2^-8 in half octaves, then halved
# steps down to a thirty-second of an octave, which is 2 percent.
_COARSE_STEPS = 17
_FINE = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
# Two ends start wider, because with few levels the error has several valleys.
_FINE_AFFINE = (1.0, 1 / 2, *_FINE)


def search_range(
    minimum: Tensor, maximum: Tensor, error: ErrorFunction, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    """Return the range inside of [minimum, maximum] that has the least error.

    Both ends are first drawn in together, by factors from 1 to 1/256 in half octaves, and those of
    an affine scheme then in turn. Halved steps around the best refine it to a thirty-second of
    an octave. Without the ripple of rounding, the error is convex in the ends, so that the least
    one is found; a histogram has hardly any ripple. In a short row of a weight with 8 bits the
    ripple is large, and an exhaustive search finds ranges with an error of a tenth less. Of equal
    errors the wider range is taken.

    Args:
        minimum: smallest values, float32 (rows,).
        maximum: largest values, float32 (rows,).
        error: error of each candidate in each row.

    Returns:
        (minimum, maximum), float32 (rows,), with zero inside; where the range is not finite, it
        is returned as it is.
    """
    low, high = minimum.clamp(max=0.0), maximum.clamp(min=0.0)
    search = _Search(low, high, error)
    steps = torch.arange(_COARSE_STEPS, dtype=torch.float32, device=low.device).unsqueeze(1) / 2
    search.try_all(steps, steps)
    if scheme.symmetric:
        for step in _FINE:
            search.try_around(((step, step), (-step, -step)))
        return search.best()
    search.try_all(search.low_octaves.expand(_COARSE_STEPS, -1), steps)
    search.try_all(steps, search.high_octaves.expand(_COARSE_STEPS, -1))
    for step in _FINE_AFFINE:
        moves = (0.0, step, -step)
        search.try_around(tuple((a, b) for a in moves for b in moves if a or b))
    return search.best()


class _Search:
    """The best candidate so far: by how many octaves each end is drawn in, and its error."""

    def __init__(self, low: Tensor, high: Tensor, error: ErrorFunction) -> None:
        self._low, self._high, self._error = low, high, error
        self.low_octaves = torch.zeros_like(low)
        self.high_octaves = torch.zeros_like(high)
        self._least = error(low.unsqueeze(0), high.unsqueeze(0))

    def try_all(self, low_octaves: Tensor, high_octaves: Tensor) -> None:
        """Keep the best of the candidates (candidates, rows or 1) and of what was kept."""
        rows = self._low.shape[0]
        low_octaves = low_octaves.expand(-1, rows).clamp(min=0.0)
        high_octaves = high_octaves.expand(-1, rows).clamp(min=0.0)
        found = self._error(
            self._low * torch.exp2(-low_octaves), self._high * torch.exp2(-high_octaves)
        )
        errors = torch.cat([self._least, found])
        best = errors.argmin(0, keepdim=True)
        self._least = errors.gather(0, best)
        self.low_octaves = _choose(self.low_octaves, low_octaves, best)
        self.high_octaves = _choose(self.high_octaves, high_octaves, best)

    def try_around(self, moves: tuple[tuple[float, float], ...]) -> None:
        """Keep the best of moving the ends by these numbers of octaves."""
        self.try_all(
            torch.stack([self.low_octaves + low for low, _ in moves]),
            torch.stack([self.high_octaves + high for _, high in moves]),
        )

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the ends of the best candidate."""
        return (
            self._low * torch.exp2(-self.low_octaves),
            self._high * torch.exp2(-self.high_octaves),
        )


def _choose(kept: Tensor, candidates: Tensor, best: Tensor) -> Tensor:
    return torch.cat([kept.unsqueeze(0), candidates]).gather(0, best).squeeze(0)


def error_of_values(values: Tensor, scheme: QuantizationScheme) -> ErrorFunction:
    """Return the root of the summed squared error of quantizing `values`, float32 (rows, n).

    Candidates are taken one by one: what they need then stays in a processor's cache.
    """

    def error(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = compute_qparams(low, high, scheme)
        lowest, highest = _steps_of_ends(zero_point, scheme)
        inverse = scale.reciprocal()
        found = []
        for index in range(low.shape[0]):
            steps = values * inverse[index].unsqueeze(1)
            rounded = steps.round()
            rounded.clamp_(lowest[index].unsqueeze(1), highest[index].unsqueeze(1))
            found.append(torch.linalg.vector_norm(rounded.sub_(steps), dim=1))
        return torch.stack(found) * scale

    return error


def error_of_histogram(counts: Tensor, layout: Layout, scheme: QuantizationScheme) -> ErrorFunction:
    """Return the root of the summed squared error of quantizing what was counted.

    Every value counts as the centre of its bin. The unit is the width of the bins, which no
    float32 range can overflow.

    Args:
        counts: int64 (rows, bins).
        layout: where the bins lie.
    """
    position = torch.arange(counts.shape[1], device=counts.device)
    centres = (layout.first.unsqueeze(1) + position).to(torch.float32) + 0.5
    weights = counts.to(torch.float32)

    def error(low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = compute_qparams(low, high, scheme)
        lowest, highest = _steps_of_ends(zero_point, scheme)
        in_bins = (scale / layout.width()).unsqueeze(2)
        steps = centres * in_bins.reciprocal()
        rounded = steps.round()
        rounded.clamp_(lowest.unsqueeze(2), highest.unsqueeze(2))
        squares = rounded.sub_(steps).square_()
        return (squares.mul_(weights).sum(2).sqrt_()) * in_bins.squeeze(2)

    return error


def _steps_of_ends(zero_point: Tensor, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest multiple of the scale that a scheme represents."""
    lowest = (scheme.quant_min - zero_point).to(torch.float32)
    highest = (scheme.quant_max - zero_point).to(torch.float32)
    return lowest, highest
