"""torch.compile sees one graph per phase, and computes what eager mode does."""

import pytest
import torch
from torch import nn

from compression_manager.quantization import (
    MinMaxObserver,
    MovingAverageObserver,
    ObservedFakeQuantizer,
    QuantizationScheme,
    QuantizationSite,
)
from observer_reference import CALIBRATIONS, observer, scheme

# Dynamo itself instantiates the context class of autograd functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 5)
        scheme = QuantizationScheme(8, False, signed=False)
        site = QuantizationSite("layer", "activation")
        self.input_quantizer = ObservedFakeQuantizer(
            scheme, site, MovingAverageObserver(scheme, site)
        )
        scheme = QuantizationScheme(granularity="channel")
        site = QuantizationSite("layer", "weight", 5)
        self.weight_quantizer = ObservedFakeQuantizer(scheme, site, MinMaxObserver(scheme, site))

    def forward(self, input):
        return nn.functional.linear(
            self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias
        )

    def set_phase(self, **phase):
        self.input_quantizer.set_phase(**phase)
        self.weight_quantizer.set_phase(**phase)


def test_compiles_once_per_phase_and_equals_eager():
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.manual_seed(0)
    layer, twin = Layer(), Layer()
    twin.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    phases = [(True, False), (True, True), (False, True)]
    for phase_number, (observing, quantizing) in enumerate(phases, 1):
        layer.set_phase(observing=observing, quantizing=quantizing)
        twin.set_phase(observing=observing, quantizing=quantizing)
        for _ in range(4):
            x = torch.randn(3, 6)
            assert torch.equal(compiled(x), twin(x))
            assert graphs == phase_number
    for name, value in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    assert layer.input_quantizer.observer.batches_observed == 8


@pytest.mark.parametrize("kind", list(CALIBRATIONS))
def test_every_observer_is_one_graph(kind):
    torch.manual_seed(0)
    first, second = (observer(kind, scheme(4, axis=1), 3) for _ in range(2))

    def watch(input):
        first.observe(input)
        return first.observed_range()

    compiled = torch.compile(watch, backend="eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(7, 3)
        second.observe(x)
        for end, expected in zip(compiled(x), second.observed_range(), strict=True):
            assert torch.equal(end, expected)
