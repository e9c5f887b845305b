"""What quantization does to each layer of a model, measured while it runs on a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression_manager.models.calling import call_with_examples, quiet_evaluation, tensors_in
from compression_manager.quantization.layers import QuantizedLayer
from compression_manager.quantization.layers.decisions import computes_integers
from compression_manager.quantization.noise import decibels

# The shortest of some calls is what a layer takes; the others are what else the machine did.
_ROUNDS = 20
_SECONDS = 0.05


@dataclass(frozen=True)
class LayerMeasurement:
    """What was measured of one layer, over all of its calls.

    Attributes:
        sqnr_db: signal-to-quantization-noise ratio of its output in decibels, infinite without
            noise.
        time_ratio: time of its integer kernel to that of float32, on the input of its first call;
            None if it does not compute on integers.
    """

    sqnr_db: float
    time_ratio: float | None


def measure_layers(model: nn.Module, example_inputs: Any) -> dict[str, LayerMeasurement]:
    """Return layer -> what the comparison with its float class on equal input gave."""
    energies: dict[str, Tensor] = {}
    ratios: dict[str, float] = {}

    def measure(name: str) -> Any:
        def hook(
            layer: QuantizedLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            exact = layer.float_class.forward(layer, *args, **kwargs)
            energy = _energies(tensors_in(exact), tensors_in(output))
            energies[name] = energies[name] + energy if name in energies else energy
            if name not in ratios and computes_integers(layer):
                ratios[name] = _time_ratio(
                    lambda: layer.forward(*args, **kwargs),
                    lambda: layer.float_class.forward(layer, *args, **kwargs),
                )

        return hook

    with ExitStack() as stack:
        stack.enter_context(quiet_evaluation(model, restore_buffers=True))
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLayer) and module.quantizers()[0].phase.quantizing:
                handle = module.register_forward_hook(measure(name), with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
        call_with_examples(model, example_inputs)
    return {
        name: LayerMeasurement(decibels(*energy.tolist()), ratios.get(name))
        for name, energy in energies.items()
    }


def _time_ratio(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Return the ratio of the shortest times of two functions that take turns."""
    one()  # The first call brings the weight into a kernel's order.
    own: list[float] = []
    others: list[float] = []
    begin = time.perf_counter()
    while len(own) < _ROUNDS and time.perf_counter() - begin < _SECONDS:
        own.append(_seconds(one))
        others.append(_seconds(other))
    return min(own) / max(min(others), 1e-9)


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _energies(exact: Iterable[Tensor], output: Iterable[Tensor]) -> Tensor:
    """Return the sums of squares of what a layer returns and of its noise, float64 (2,)."""
    pairs = [(a.double(), b) for a, b in zip(exact, output, strict=True) if a.is_floating_point()]
    return torch.stack(
        [torch.stack([a.square().sum(), (a - b).square().sum()]) for a, b in pairs]
    ).sum(0)
