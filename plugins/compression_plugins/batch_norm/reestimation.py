"""Cumulative averages of BatchNorm's batch statistics, and nothing else changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compression_manager.models.calling import call_model, quiet_evaluation
from compression_manager.models.hooks import ModelHooks
from compression_manager.tracking.batches import to_device_of


def layers_with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def reestimate(model: nn.Module, inputs: Iterable[Any]) -> int:
    """Set the running statistics of `model` to the averages over `inputs`.

    Every BatchNorm normalizes with its batch's statistics, as in training, and its running mean
    and variance become the plain averages of the batches' means and unbiased variances, whatever
    their sizes: the convention of `torch.optim.swa_utils.update_bn` (Izmailov et al., 2018,
    arXiv:1803.05407). All other modules are in eval mode, so that observers stay as they are
    and fake quantization acts. Modes, momenta and the random state are as before afterwards;
    after an exception the statistics are, too.

    Args:
        model: any module.
        inputs: what the model is called with, in turn; moved to its device.

    Returns:
        The number of inputs; with none the statistics stay as they were.
    """
    layers = layers_with_statistics(model)
    before = [_statistics(layer) for layer in layers]
    count = 0
    try:
        with quiet_evaluation(model), _averaging(layers):
            for value in inputs:
                call_model(model, to_device_of(model, value))
                count += 1
    except BaseException:
        _put_back(layers, before)
        raise
    if count == 0:
        _put_back(layers, before)
    return count


@contextmanager
def _averaging(layers: list[_BatchNorm]) -> Iterator[None]:
    """Have the layers start anew and average; their modes are whoever's is outside of this."""
    hooks = ModelHooks()
    momenta = [layer.momentum for layer in layers]
    with ExitStack() as stack:
        stack.callback(hooks.remove_all)
        for layer, momentum in zip(layers, momenta, strict=True):
            stack.callback(setattr, layer, "momentum", momentum)
            layer.momentum = None  # a cumulative average, in torch
            layer.reset_running_stats()
            # Last of all hooks: another one may hold frozen layers in eval mode.
            hooks.add_forward_pre_hook(layer, _set_training)
        yield


def _set_training(module: nn.Module, args: Any) -> None:
    module.training = True


def _statistics(layer: _BatchNorm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.named_buffers(recurse=False)}


def _put_back(layers: list[_BatchNorm], before: list[dict[str, Tensor]]) -> None:
    for layer, statistics in zip(layers, before, strict=True):
        for name, value in statistics.items():
            layer.get_buffer(name).copy_(value)
