"""A trained model in a fraction of its bytes: weights to integers, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from compression_manager.configuration.checks import require_type
from compression_manager.errors import ConfigError, QuantizationError
from compression_manager.quantization.arithmetic.parameters import check_range, choose_qparams
from compression_manager.quantization.arithmetic.ranges import range_shape
from compression_manager.quantization.calibration import Calibration, MinMaxCalibration
from compression_manager.quantization.layers import QuantizedLayer
from compression_manager.quantization.noise import sqnr_db
from compression_manager.quantization.scheme import QuantizationScheme
from compression_manager.quantization.site import QuantizationSite
from compression_manager.quantization.storage.exchange import (
    Encoded,
    replace_by_floats,
    replace_by_integers,
)
from compression_manager.quantization.storage.module import IntegerWeights, StoredWeight
from compression_manager.quantization.storage.report import StorageReport, describe_storage
from compression_manager.quantization.storage.selection import FoundParameter, find_parameters
from compression_manager.quantization.storage.weight import WeightFormat

_MIN_MAX = MinMaxCalibration()


class Quantizer:
    """Stores the weights of trained models as integers, in place.

    Every floating-point Parameter of at least two dimensions is a weight, of modules of any
    class. The model still computes: weights are dequantized when they are read, with
    `(integers - zero_point) * scale`. Activations stay in floating point. After Burn's
    `Quantizer` (quantize_weights, and dequantizing after loading).

    A channel axis counts the dimensions of the weight as the module holds it: axis 0 is the
    output channels of Linear and Conv, the input channels of ConvTranspose and of transformers'
    Conv1D, the vocabulary of Embedding.

    Args:
        scheme: static; the same for all weights.
        calibration: chooses each weight's range from its values; those other than min-max may
            clip.
        skip: what stays in floating point: names or globs of weights ("head.weight"), or of
            layers ("head"), which mean all that is inside of them.

    Raises:
        QuantizationError: the scheme is dynamic.
        ConfigError: an argument has another type.
    """

    def __init__(
        self,
        scheme: QuantizationScheme,
        calibration: Calibration = _MIN_MAX,
        *,
        skip: Sequence[str] = (),
    ) -> None:
        require_type("Quantizer", "scheme", scheme, QuantizationScheme)
        require_type("Quantizer", "calibration", calibration, Calibration)
        if isinstance(skip, str) or not all(isinstance(item, str) for item in skip):
            raise ConfigError(f"Quantizer.skip must be a list of names or globs, got {skip!r}.")
        if scheme.dynamic:
            raise QuantizationError(
                f"Quantizer: {scheme} takes its range from each input as it comes, which weights "
                "are not; leave out dynamic=True (granularity 'tensor', 'channel' or 'group')."
            )
        self.scheme = scheme
        self.calibration = calibration
        self.skip = tuple(skip)

    def quantize_weights(self, model: nn.Module) -> nn.Module:
        """Replace the weights of `model` by integers, and return it.

        Its state_dict then holds, for a weight `fc.weight`, the integers `fc.weight`,
        `fc.weight_scale`, `fc.weight_zero_point` (affine schemes only) and `fc.weight_scheme`
        (`WeightFormat` says which dtypes and shapes). A weight shared by several modules is held
        once, under its first name. Modules keep their identity and hooks; their classes become
        generated subclasses, and `parameters()` lists the weights no longer.

        Raises:
            QuantizationError: the model holds integer weights or is prepared for training
                already, has no weight to quantize, or a weight is not finite or lacks the
                scheme's axis. The model is unchanged then.
            ConfigError: `model` is no module, or an entry of `skip` matches nothing.
        """
        return self._store(model, self._encode)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Give `model` the places for integer weights, without values, and return it.

        For loading: `model.load_state_dict(...)` then takes what a model quantized with the same
        scheme and `skip` has saved. Works on the meta device (with `assign=True`).

        Raises:
            QuantizationError: as `quantize_weights`, but for values that are not finite.
            ConfigError: as `quantize_weights`.
        """
        return self._store(model, self._reserve)

    def dequantize_weights(self, model: nn.Module) -> nn.Module:
        """Make all integer weights of `model` Parameters again, whatever their scheme.

        Names, classes, order and requires_grad are those from before quantizing, shared weights
        are shared; the values are those that the integers stand for. Returns `model`.

        Raises:
            QuantizationError: the model holds no integer weights.
            ConfigError: `model` is no module.
        """
        require_type("dequantize_weights", "model", model, nn.Module)
        modules = [item for item in model.modules() if isinstance(item, IntegerWeights)]
        if not modules:
            raise QuantizationError(
                "dequantize_weights: the model holds no integer weights; call quantize_weights, "
                "or prepare and load_state_dict, first."
            )
        replace_by_floats(modules)
        return model

    def report(self, model: nn.Module) -> StorageReport:
        """Return how each Parameter of `model` is stored, or why it is in floating point.

        Raises:
            ConfigError: `model` is no module, or an entry of `skip` matches nothing.
        """
        require_type("report", "model", model, nn.Module)
        return describe_storage(model, self.skip)

    def _store(self, model: nn.Module, encode: Callable[[FoundParameter], Encoded]) -> nn.Module:
        require_type("Quantizer", "model", model, nn.Module)
        _refuse_compiled(model)
        _refuse_quantized(model)
        found = find_parameters(model, self.skip)
        chosen = [item for item in found if item.reason is None]
        if not chosen:
            reasons = "; ".join(f"{item.names[0]}: {item.reason}" for item in found[:8])
            raise QuantizationError(
                "there is nothing to quantize: the model has no floating-point weight of at least "
                f"two dimensions that is not skipped ({reasons or 'it has no parameters'})."
            )
        for item in chosen:
            self._check(item)
        with torch.no_grad():
            encoded = [(item, encode(item)) for item in chosen]
        replace_by_integers(encoded)
        return model

    def _check(self, found: FoundParameter) -> None:
        name, weight = found.names[0], found.parameter
        if is_lazy(weight):
            raise QuantizationError(
                f"weight '{name}' is not initialised yet; run one forward pass first."
            )
        try:
            range_shape(self.scheme, weight.shape)
        except QuantizationError as error:
            raise QuantizationError(
                f"weight '{name}': {error} Leave it out with skip=('{name}',), or use another axis."
            ) from error
        for module, attribute in found.places:
            for suffix in WeightFormat(self.scheme, tuple(weight.shape)).suffixes()[1:]:
                if hasattr(module, attribute + suffix):
                    raise QuantizationError(
                        f"weight '{name}': its module has an attribute '{attribute}{suffix}' "
                        "already, where the integers' own would stand; leave it out with "
                        f"skip=('{name}',)."
                    )

    def _encode(self, found: FoundParameter) -> Encoded:
        name, weight = found.names[0], found.parameter.detach()
        if weight.is_meta:
            raise QuantizationError(
                f"weight '{name}' is on the meta device and has no values; call prepare, and load "
                "quantized ones with load_state_dict(..., assign=True)."
            )
        if not bool(weight.isfinite().all()):
            place = weight.isfinite().logical_not().nonzero()[0].tolist()
            raise QuantizationError(
                f"weight '{name}' holds {weight[tuple(place)].item()} at {place} and cannot be "
                f"quantized; repair it, or leave it out with skip=('{name}',)."
            )
        axis = self.scheme.axis
        site = QuantizationSite(
            found.layer,
            "weight",
            None if axis is None else weight.shape[axis],
            weight.device,
            tuple(weight.shape),
        )
        observer = self.calibration.make_observer(self.scheme, site)
        minimum, maximum = observer.compute_range(weight)
        check_range(minimum, maximum, where=f"weight '{name}': a range")
        stored = self._describe(weight, found.parameter.requires_grad)
        scale, zero_point = choose_qparams(minimum, maximum, self.scheme)
        tensors = stored.format.encode(weight, scale, zero_point)
        stored.sqnr_db = sqnr_db(weight, stored.format.decode(tensors, weight.dtype))
        return stored, tensors

    def _reserve(self, found: FoundParameter) -> Encoded:
        weight = found.parameter
        stored = self._describe(weight, weight.requires_grad)
        return stored, stored.format.placeholders(weight.device)

    def _describe(self, weight: Tensor, requires_grad: bool) -> StoredWeight:
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
        channels_last = (
            last is not None
            and weight.is_contiguous(memory_format=last)
            and not weight.is_contiguous()
        )
        weight_format = WeightFormat(self.scheme, tuple(weight.shape))
        return StoredWeight(weight_format, weight.dtype, requires_grad, channels_last)


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"layer '{name}'" if name else "the model"
            raise QuantizationError(
                f"{where} is a TorchScript module, whose code is fixed; quantize the module that "
                "it was made from."
            )


def _refuse_quantized(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"layer '{name}'" if name else "the model"
        if isinstance(module, IntegerWeights):
            raise QuantizationError(
                f"{where} holds integer weights already; call dequantize_weights first, or "
                "quantize a fresh float model."
            )
        if isinstance(module, QuantizedLayer):
            raise QuantizationError(
                f"{where} is prepared for quantization-aware training; convert the model, or "
                "close its manager, first."
            )
