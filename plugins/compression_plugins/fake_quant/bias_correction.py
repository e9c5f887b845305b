"""Empirical bias correction: the mean error of a layer's output is taken out of its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction"
(arXiv:1906.04721), section 4.2 and appendix D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compression_manager.quantization.layers import QuantizedLayer, SinglePartLayer
from compression_plugins.fake_quant.calibration_run import CalibrationData, progress


class OutputMeans:
    """The means of layers' outputs per channel, over all calls while `watching`.

    Attributes:
        layers: name -> layer.
    """

    def __init__(self, layers: Mapping[str, SinglePartLayer]) -> None:
        self.layers = layers
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take every call of the layers within the block into account."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                # First of all hooks: it sees what the layer itself computes.
                handle = layer.register_forward_hook(self._adding(name), prepend=True)
                stack.callback(handle.remove)
            yield

    def means(self) -> dict[str, Tensor]:
        """Return layer -> float64 (channels,), in the order in which the layers first ran."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def _adding(self, name: str) -> Callable[..., None]:
        def hook(layer: SinglePartLayer, args: Any, output: Tensor) -> None:
            if output.numel() == 0:
                return
            # Channels are the last dimension for a matrix, before the spatial ones for a kernel.
            axis = output.dim() - (layer.weight.dim() - 1)
            others = [dim for dim in range(output.dim()) if dim != axis]
            total = output.to(torch.float64).sum(others) if others else output.to(torch.float64)
            if not total.isfinite().all():  # observers leave such a batch out as well
                return
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            count = output.numel() // output.shape[axis]
            self._counts[name] = self._counts.get(name, 0) + count

        return hook


class CorrectedBias(nn.Module):
    """What one tensor was before and after its correction; buffers, so that checkpoints hold it.

    Attributes:
        before: (channels,), dtype of the tensor.
        after: as `before`.
    """

    before: Tensor
    after: Tensor

    def __init__(self, before: Tensor, after: Tensor) -> None:
        super().__init__()
        self.register_buffer("before", before)
        self.register_buffer("after", after)

    @torch.no_grad()
    def undo(self, tensor: Tensor) -> None:
        """Take the correction back; exactly, unless training changed the tensor since."""
        if torch.equal(tensor, self.after):
            tensor.copy_(self.before)
        else:
            tensor.sub_(self.after - self.before)


class BiasCorrection:
    """Corrects the biases of a model, and takes the corrections back.

    A layer without a bias of its own is corrected in the running mean of the BatchNorm behind
    it, which adds the same to the bias that folding creates.

    Args:
        model: changed in place by `correct`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._corrected: dict[str, CorrectedBias] = {}

    def correct(
        self, targets: Mapping[str, str], float_means: OutputMeans, data: CalibrationData, bar: str
    ) -> None:
        """Correct one layer after the other, each with all that feed it corrected already.

        Args:
            targets: layer -> name of the tensor that is corrected.
            float_means: over `data`, before anything was quantized.
            data: the very batches of `float_means`; run once per layer.
            bar: title of the progress bar.
        """
        wanted = float_means.means()
        order = [name for name in wanted if name in targets]
        with progress(order, bar, len(order), "layer") as names:
            for name in names:
                layer = float_means.layers[name]
                found = OutputMeans({name: layer})
                with found.watching():
                    data.run(self._model)
                mean = found.means().get(name)
                if mean is not None:
                    self._take_out(targets[name], mean - wanted[name], layer)

    def undo(self) -> None:
        """Take all corrections back."""
        for name, corrected in self._corrected.items():
            corrected.undo(self._tensor(name))
        self._corrected.clear()

    def _take_out(self, name: str, error: Tensor, layer: SinglePartLayer) -> None:
        tensor = self._tensor(name)
        before = tensor.detach().clone()
        sign = 1.0 if name.endswith(".running_mean") else -1.0
        tensor.copy_(before.to(torch.float64) + sign * error)
        self._corrected[name] = CorrectedBias(before, tensor.detach().clone())
        # Inside of a quantizer it leaves with it, and a float state_dict need not hold it.
        layer.weight_quantizer.add_module("corrected_bias", self._corrected[name])

    def _tensor(self, name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        return cast(Tensor, getattr(self._model.get_submodule(owner), attribute))


def find_targets(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], pairs: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return layer -> tensor to correct, and layer -> reason for those that have none.

    Args:
        model: the model of the layers.
        layers: name -> quantization-aware layer.
        pairs: BatchNorm -> convolution that feeds only it.
    """
    batch_norm_of = {convolution: name for name, convolution in pairs.items()}
    targets: dict[str, str] = {}
    reasons: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if not isinstance(layer, SinglePartLayer):
            reasons[name] = f"a {layer.float_class.__name__} has no output of its own per weight"
            continue
        bias = getattr(layer, "bias", None)
        if bias is not None:
            if id(bias) in owners:
                reasons[name] = f"it shares its bias with '{owners[id(bias)]}'"
                continue
            owners[id(bias)] = name
            targets[name] = f"{name}.bias" if name else "bias"
        elif _has_running_mean(model, batch_norm_of.get(name)):
            targets[name] = f"{batch_norm_of[name]}.running_mean"
        else:
            reasons[name] = "it has no bias"
    return targets, reasons


def _has_running_mean(model: nn.Module, batch_norm: str | None) -> bool:
    if batch_norm is None:
        return False
    return cast(_BatchNorm, model.get_submodule(batch_norm)).running_mean is not None
