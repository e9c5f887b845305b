"""Making the fake quantizers of one planned layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compression_manager.quantization import FakeQuantizer, QuantizationScheme, QuantizationSite
from compression_manager.quantization.layers import Quantizers
from compression_manager.services import Services
from compression_plugins.fake_quant.plan import LayerPlan, operands_of


def make_quantizers(
    services: Services, planned: LayerPlan, model: nn.Module
) -> dict[str, Quantizers]:
    """Return part -> the quantizers of the layer `planned` of `model`, asked of the services."""
    made = {}
    for part, operand in operands_of(model.get_submodule(planned.name)).items():
        name = ".".join(filter(None, (planned.name, part)))
        weight, device = None, _device_of(model)
        if operand.weight is not None:
            assert planned.weight is not None  # the plan has a scheme for whatever has a weight
            device = operand.weight.device
            weight = _for_weight(services, planned.weight, name, operand.weight)
        activation = None
        if planned.activation is not None:
            site = QuantizationSite(name, "activation", None, device)
            activation = services.make_fake_quantizer(planned.activation, site)
        made[part] = Quantizers(weight, activation)
    return made


def _for_weight(
    services: Services, scheme: QuantizationScheme, name: str, weight: Tensor
) -> FakeQuantizer:
    channels = None if scheme.axis is None else weight.shape[scheme.axis]
    site = QuantizationSite(name, "weight", channels, weight.device, tuple(weight.shape))
    return services.make_fake_quantizer(scheme, site)


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
