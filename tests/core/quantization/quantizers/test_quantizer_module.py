"""The fake quantizer of a site: phases, ranges, state, and what it computes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    FakeQuantizer,
    ObservedFakeQuantizer,
    Observer,
    QuantizationScheme,
    QuantizationSite,
    choose_qparams,
    fake_quantize,
)

UINT8 = QuantizationScheme(8, False, signed=False)
PER_CHANNEL = QuantizationScheme(granularity="channel")


class LastBatchObserver(Observer):
    """A minimal observer: the range of the last finite batch."""

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(shape))
        self.register_buffer("high", torch.zeros(shape))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.asked = 0

    def observe(self, input: Tensor) -> None:
        low, high = self.compute_range(input)
        if bool(low.isfinite().all() & high.isfinite().all()):
            self.low.copy_(low)
            self.high.copy_(high)
            self.seen.add_(1)

    def compute_range(self, input: Tensor) -> tuple[Tensor, Tensor]:
        if self.low.dim():
            return input.flatten(1).amin(1).float(), input.flatten(1).amax(1).float()
        return input.min().float(), input.max().float()

    def observed_range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def has_observed(self) -> bool:
        self.asked += 1
        return bool(self.seen > 0)


def activation(scheme=UINT8) -> ObservedFakeQuantizer:
    site = QuantizationSite("block.conv1", "activation")
    return ObservedFakeQuantizer(scheme, site, LastBatchObserver())


def weight(channels=4) -> ObservedFakeQuantizer:
    site = QuantizationSite("block.conv1", "weight", channels)
    return ObservedFakeQuantizer(PER_CHANNEL, site, LastBatchObserver((channels,)))


def sample(seed=0, factor=1.0):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) * factor


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def expected_output(x, low, high, scheme=UINT8):
    qparams = choose_qparams(torch.as_tensor(low), torch.as_tensor(high), scheme)
    return fake_quantize(x, *qparams, scheme.quant_min, scheme.quant_max, scheme.axis)


def test_off_at_construction():
    for module in (activation(), weight()):
        x = sample()
        before = snapshot(module)
        assert module.phase == (False, False)
        assert module(x) is x
        assert unchanged(module, before)


def test_activation_observes_then_quantizes():
    module = activation()
    module.set_phase(observing=True, quantizing=False)
    first, second = sample(0), sample(1, 3.0)
    assert module(first) is first
    scale, zero_point = choose_qparams(first.min(), first.max(), UINT8)
    parameters = module.quantization_parameters()
    assert torch.equal(parameters.scale, scale)
    assert torch.equal(parameters.zero_point, zero_point)
    module.set_phase(observing=False, quantizing=True)
    assert torch.equal(module(second), expected_output(second, first.min(), first.max()))
    module.set_phase(observing=True, quantizing=True)
    assert torch.equal(module(second), expected_output(second, second.min(), second.max()))
    module.set_phase(observing=False, quantizing=True)
    assert torch.equal(module(first), expected_output(first, second.min(), second.max()))


def test_a_range_is_searched_for_only_when_it_is_used():
    module = activation()
    asked = []
    search = module.observer.observed_range
    module.observer.observed_range = lambda: asked.append(1) or search()
    module.set_phase(observing=True, quantizing=False)
    for seed in range(5):
        module(sample(seed))
    assert not asked
    module.set_phase(observing=False, quantizing=True)
    module(sample())
    assert len(asked) == 1


def test_ranges_are_updated_in_place():
    module = activation()
    addresses = {name: value.data_ptr() for name, value in module.state_dict().items()}
    module.set_phase(observing=True, quantizing=True)
    module(sample())
    assert {name: value.data_ptr() for name, value in module.state_dict().items()} == addresses
    assert module.observing.item() is True
    assert module.quantizing.item() is True


def test_evaluation_changes_nothing_but_quantizes():
    module = activation()
    module.set_phase(observing=True, quantizing=True)
    x = sample()
    module(x)
    module.eval()
    before = snapshot(module)
    larger = x * 10
    assert torch.equal(module(larger), expected_output(larger, x.min(), x.max()))
    assert unchanged(module, before)


def test_gradient_reaches_the_input_and_not_the_observer():
    module = activation()
    module.set_phase(observing=True, quantizing=True)
    x = sample().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert not module.scale.requires_grad
    assert not module.observer.low.requires_grad


def test_passes_through_until_a_finite_batch_was_seen():
    module = activation()
    module.set_phase(observing=True, quantizing=True)
    bad = torch.full((3,), float("nan"))
    assert module(bad) is bad
    assert not module.is_calibrated()
    with pytest.raises(QuantizationError, match=r"activation of layer 'block\.conv1'.*no finite"):
        module.quantization_parameters()
    x = sample()
    assert torch.equal(module(x), expected_output(x, x.min(), x.max()))
    assert module.is_calibrated()


def test_calibration_is_asked_for_only_until_it_is_there():
    module = activation()
    module.set_phase(observing=True, quantizing=True)
    module(sample())
    asked = module.observer.asked
    for _ in range(5):
        module(sample())
    module.set_phase(observing=False, quantizing=True)
    assert module.observer.asked == asked


@pytest.mark.parametrize("training", [True, False])
def test_weight_is_quantized_with_its_present_range(training):
    module = weight()
    module.train(training)
    module.set_phase(observing=True, quantizing=True)
    before = snapshot(module)
    for values in (torch.randn(4, 3), torch.randn(4, 3) * 7):
        low, high = values.amin(1), values.amax(1)
        assert torch.equal(module(values), expected_output(values, low, high, PER_CHANNEL))
    assert unchanged(module, before)
    assert module.is_calibrated()


def test_weight_keeps_no_scale():
    assert not {"scale", "zero_point"} & set(weight().state_dict())


def test_weight_keeps_its_dtype_and_gradient():
    module = weight()
    module.set_phase(observing=False, quantizing=True)
    parameter = nn.Parameter(torch.randn(4, 3).bfloat16())
    output = module(parameter)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert parameter.grad is not None
    # The largest value is never clipped by its own range.
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_quantization_parameters_of_an_activation():
    module = activation()
    module.set_phase(observing=True, quantizing=True)
    x = sample()
    module(x)
    found = module.quantization_parameters()
    assert (found.quant_min, found.quant_max, found.axis) == (0, 255, None)
    assert torch.equal(found.scale, module.scale)
    module(x * 5)
    scale, zero_point = choose_qparams(x.min(), x.max(), UINT8)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.zero_point, zero_point)


def test_quantization_parameters_of_a_weight():
    module = weight()
    values = torch.randn(4, 3)
    found = module.quantization_parameters(values)
    assert (found.quant_min, found.quant_max, found.axis) == (-127, 127, 0)
    torch.testing.assert_close(found.scale, values.abs().amax(1) / 127, rtol=1e-6, atol=0)
    with pytest.raises(QuantizationError, match=r"weight of layer 'block\.conv1'.*weight itself"):
        module.quantization_parameters()
    values[2, 1] = float("nan")
    with pytest.raises(QuantizationError, match=r"weight of layer 'block\.conv1'.*in channel 2"):
        module.quantization_parameters(values)


def test_state_continues_where_it_was_saved():
    source, target = activation(), activation()
    source.set_phase(observing=True, quantizing=True)
    source(sample())
    target.load_state_dict(source.state_dict())
    assert target.phase == (True, True)
    assert target.is_calibrated()
    source.eval()
    target.eval()
    x = sample(3, 2.0)
    assert torch.equal(source(x), target(x))
    # Loading an earlier state forgets the calibration as well.
    target.load_state_dict(activation().state_dict())
    assert target.phase == (False, False)
    assert not target.is_calibrated()


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)
        self.input_quantizer = activation()
        self.weight_quantizer = weight(2)

    def forward(self, input: Tensor) -> Tensor:
        quantized = self.weight_quantizer(self.weight)
        return nn.functional.linear(self.input_quantizer(input), quantized, self.bias)


def calibrated_model() -> nn.Sequential:
    model = nn.Sequential(Layer(), nn.Linear(2, 2))
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.set_phase(observing=True, quantizing=True)
    model(sample())
    return model


def test_a_float_state_dict_loads_and_leaves_the_ranges():
    model = calibrated_model()
    plain = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    before = snapshot(model)
    state = plain.state_dict()
    names = list(state)
    assert str(model.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert list(state) == names
    for name, value in model.state_dict().items():
        assert torch.equal(value, state.get(name, before[name])), name
    assert model[0].input_quantizer.phase == (True, True)
    assert model[0].input_quantizer.is_calibrated()


@pytest.mark.parametrize("lost", ["scale", "observing", "observer.low"])
def test_a_partial_state_dict_is_an_error(lost):
    model = calibrated_model()
    state = model.state_dict()
    del state[f"0.input_quantizer.{lost}"]
    with pytest.raises(RuntimeError, match=rf"Missing key.*0\.input_quantizer\.{lost}"):
        model.load_state_dict(state)


def test_deepcopy_is_independent():
    model = calibrated_model()
    twin = copy.deepcopy(model)
    before = snapshot(model)
    twin(sample(5, 9.0))
    twin[0].input_quantizer.set_phase(observing=False, quantizing=False)
    assert unchanged(model, before)
    assert model[0].input_quantizer.phase == (True, True)
    assert not torch.equal(twin[0].input_quantizer.scale, model[0].input_quantizer.scale)
    twin.load_state_dict(model.state_dict())
    assert twin[0].input_quantizer.phase == (True, True)


@pytest.mark.parametrize("renewed", [copy.deepcopy, lambda module: module._apply(torch.clone)])
def test_a_phase_written_to_a_copy_or_to_moved_buffers_is_seen(renewed):
    """They count their changes from the beginning, and so may reach the count from before."""
    quantizer = activation()
    for _ in range(5):
        quantizer.set_phase(observing=False, quantizing=True)
    changes = quantizer.quantizing._version
    quantizer = renewed(quantizer)
    assert quantizer.quantizing._version < changes
    while quantizer.quantizing._version < changes:
        quantizer.quantizing.fill_(False)
    assert not quantizer.phase.quantizing


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_the_model_keeps_the_ranges(cast):
    model = calibrated_model()
    before = snapshot(model[0].input_quantizer)
    getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    for name, value in model[0].input_quantizer.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_moving_to_another_device():
    module = activation().to("meta")
    assert {value.device.type for value in module.state_dict().values()} == {"meta"}
    both = activation().to("meta", torch.float16)
    assert both.scale.device.type == both.observer.low.device.type == "meta"
    assert both.scale.dtype == both.observer.low.dtype == torch.float32


def test_per_channel_needs_the_number_of_channels():
    site = QuantizationSite("head", "weight")
    with pytest.raises(QuantizationError, match=r"weight of layer 'head'.*number of channels"):
        ObservedFakeQuantizer(PER_CHANNEL, site, LastBatchObserver())


def test_long_integers_get_a_long_zero_point():
    assert activation(QuantizationScheme(25, False)).zero_point.dtype == torch.int64
    assert activation(QuantizationScheme(24, False)).zero_point.dtype == torch.int32


def test_prints_its_scheme():
    assert "uint8 affine per tensor, activation" in repr(activation())
