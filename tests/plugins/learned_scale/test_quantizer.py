"""What a learned quantizer starts from, when it learns, and what it hands to conversion."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from compression_manager import QuantizationError
from compression_manager.quantization import (
    Phase,
    QuantizationScheme,
    QuantizationSite,
    fake_quantize,
    quantize,
)
from compression_plugins.calibration import MinMaxObserver
from compression_plugins.learned_scale import LearnedScaleQuantizer

UNSIGNED = QuantizationScheme(bits=4, symmetric=False, signed=False)


def quantizer(
    scheme: QuantizationScheme = UNSIGNED,
    role: str = "activation",
    *,
    shape: tuple[int, ...] = (6, 20),
    gradient_scaling: bool = False,
    minimum_scale: float = 1e-7,
) -> LearnedScaleQuantizer:
    channels = None if scheme.axis is None else shape[scheme.axis]
    site = QuantizationSite("layer", role, channels, shape=shape if role == "weight" else None)
    return LearnedScaleQuantizer(
        scheme,
        site,
        MinMaxObserver(scheme, site),
        gradient_scaling=gradient_scaling,
        minimum_scale=minimum_scale,
    )


def observed(
    *batches: torch.Tensor, scheme: QuantizationScheme = UNSIGNED
) -> LearnedScaleQuantizer:
    module = quantizer(scheme)
    module.set_phase(observing=True, quantizing=False)
    for batch in batches:
        assert module(batch) is batch
    module.set_phase(observing=True, quantizing=True)
    return module


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


# Start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_a_weight_starts_at_lsqs_value_or_at_its_range(bits, granularity):
    torch.manual_seed(bits)
    scheme = QuantizationScheme(bits=bits, granularity=granularity)
    weight = torch.randn(6, 64)
    module = quantizer(scheme, "weight", shape=(6, 64))
    module.set_phase(observing=False, quantizing=True)
    module(weight)
    values = weight.double().numpy()
    rows = {"tensor": (1, -1), "channel": (6, -1), "group": (12, 32)}[granularity]
    values = values.reshape(rows)
    steps = scheme.quant_max
    lsq = 2 * np.abs(values).mean(1) / math.sqrt(steps)
    ranges = np.abs(values).max(1) / steps
    expected = np.minimum(lsq, ranges).reshape(module.log_scale.shape)
    assert bits in (2, 3, 4) or (ranges < lsq).all()
    assert bits != 2 or (lsq < ranges).all()
    actual = module.quantization_parameters(weight).scale.numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_an_activation_starts_from_all_finite_batches(skip):
    torch.manual_seed(0)
    batches = [torch.rand(6, 20) * 9, torch.rand(4, 20).square()]
    bad = [torch.full((6, 20), float("nan")), torch.zeros(0, 20)] if skip else []
    module = observed(batches[0], *bad, batches[1])
    module(batches[0])
    mean = np.mean([batch.double().mean().item() for batch in batches])
    high = max(batch.max().item() for batch in batches)
    parameters = module.quantization_parameters()
    expected = min(2 * mean / math.sqrt(15), high / 15)
    assert expected < 2 * mean / math.sqrt(15)
    np.testing.assert_allclose(parameters.scale.item(), expected, rtol=1e-5)
    assert parameters.zero_point.item() == 0
    assert parameters.zero_point.dtype == torch.int32


def test_the_zero_point_starts_where_the_range_has_it():
    module = observed(torch.tensor([[-1.0, 3.0]]))
    module(torch.ones(2, 2))
    assert module.quantization_parameters().zero_point.item() == 4  # 0 - round(-1 / (4 / 15))


def test_nothing_is_quantized_before_a_finite_batch():
    module = quantizer()
    module.set_phase(observing=True, quantizing=True)
    nan = torch.full((2, 3), float("nan"))
    assert module(nan) is nan
    assert not module.is_calibrated()
    with pytest.raises(QuantizationError, match="activation of layer 'layer': no finite value"):
        module.quantization_parameters()
    module(torch.rand(2, 3))
    assert bool(module.started)


def test_the_observer_is_not_asked_after_the_start():
    module = observed(torch.rand(4, 3))
    module(torch.rand(4, 3))
    before = state(module)
    module(torch.rand(4, 3) * 100)
    assert all(torch.equal(before[name], value) for name, value in state(module).items())


def test_evaluation_changes_nothing_and_gives_what_training_would():
    batch = torch.rand(4, 3)
    module = observed(batch).eval()
    before = state(module)
    evaluated = module(batch)
    assert all(torch.equal(before[name], value) for name, value in state(module).items())
    assert not torch.equal(evaluated, batch)
    assert torch.equal(module.train()(batch), evaluated)
    assert bool(module.started)


def test_a_weight_that_is_not_finite_starts_nothing():
    module = quantizer(QuantizationScheme(bits=4), "weight")
    module.set_phase(observing=True, quantizing=True)
    weight = torch.full((6, 20), float("inf"))
    module(weight)
    assert not bool(module.started)
    with pytest.raises(QuantizationError, match="weight of layer 'layer': the range"):
        module.quantization_parameters(weight)
    with pytest.raises(QuantizationError, match="needs the weight itself"):
        module.quantization_parameters()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_training_broke_is_named(value):
    module = observed(torch.rand(4, 3))
    module(torch.rand(4, 3))
    with torch.no_grad():
        module.log_scale.fill_(value)
    with pytest.raises(QuantizationError, match="'layer': the learned scale"):
        module.quantization_parameters()


def test_more_than_24_bits_are_refused():
    with pytest.raises(QuantizationError, match=r"'layer': a learned scale takes at most 24 bits"):
        quantizer(QuantizationScheme(bits=25))


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize(
    ("scheme", "role", "shape", "count", "steps"),
    [
        (QuantizationScheme(bits=3), "weight", (6, 20), 120, 3),
        (QuantizationScheme(bits=3, granularity="channel"), "weight", (6, 20), 20, 3),
        (QuantizationScheme(bits=4, granularity="group", group_size=10), "weight", (6, 20), 10, 7),
        (UNSIGNED, "activation", (5, 2, 7), 14, 15),
        (QuantizationScheme(bits=4, symmetric=False), "activation", (5, 14), 14, 15),
        (QuantizationScheme(bits=4, signed=False), "activation", (5, 14), 14, 7),
    ],
)
def test_gradient_factor_of_lsq(scaling, scheme, role, shape, count, steps):
    torch.manual_seed(0)
    input = torch.randn(shape)
    gradients = []
    for enabled in (False, scaling):
        module = quantizer(scheme, role, shape=shape, gradient_scaling=enabled)
        module.set_phase(observing=True, quantizing=True)
        module(input).square().sum().backward()
        gradients.append(module.log_scale.grad)
    factor = 1 / math.sqrt(count * steps) if scaling else 1.0
    np.testing.assert_allclose(gradients[1].numpy(), gradients[0].numpy() * factor, rtol=1e-4)
    assert bool((gradients[0] != 0).any())


@pytest.mark.parametrize("scheme", [UNSIGNED, QuantizationScheme(bits=3)], ids=str)
def test_training_finds_a_better_grid_and_conversion_stores_it(scheme):
    torch.manual_seed(0)
    batch = torch.randn(64, 8) + (2.0 if scheme is UNSIGNED else 0.0)
    module = observed(batch, scheme=scheme)
    module(batch)
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    first = error = (module(batch) - batch).square().mean()
    for _ in range(200):
        error = (module(batch) - batch).square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert error < 0.9 * first
    values = module.quantization_parameters()
    low, high = values.quant_min, values.quant_max
    expected = fake_quantize(batch, values.scale, values.zero_point, low, high)
    assert torch.equal(module(batch), expected)
    codes = quantize(batch, values.scale, values.zero_point, low, high)
    assert torch.equal((codes.int() - values.zero_point) * values.scale, expected)
    assert low <= values.zero_point.item() <= high


def test_freezing_ends_learning_of_activations_even_with_momentum():
    module = observed(torch.rand(4, 3))
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)

    def update() -> None:
        output = module((torch.rand(4, 3) * 2).requires_grad_())
        output.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    update()
    learned = module.log_scale.item()
    update()
    assert module.log_scale.item() != learned
    module.set_phase(observing=False, quantizing=True)
    frozen = state(module)
    update()
    assert torch.equal(module.log_scale, frozen["log_scale"])
    assert torch.equal(module.zero_fraction, frozen["zero_fraction"])
    again = observed(torch.rand(4, 3))
    again.load_state_dict(frozen)
    assert not again.log_scale.requires_grad
    module.set_phase(observing=True, quantizing=True)
    update()
    assert module.log_scale.item() != frozen["log_scale"].item()


def test_freezing_observers_does_not_concern_weights():
    module = quantizer(QuantizationScheme(bits=4), "weight")
    module.set_phase(observing=False, quantizing=True)
    module(torch.randn(6, 20)).sum().backward()
    assert module.log_scale.grad is not None


# State -------------------------------------------------------------------------------------------


def test_state_is_complete_and_that_of_a_float_model_changes_nothing():
    batch = torch.rand(4, 3)
    module = observed(batch)
    module(batch)
    with torch.no_grad():
        module.log_scale.add_(0.3)
    other = quantizer()
    other.load_state_dict(state(module))
    assert other.phase == Phase(observing=True, quantizing=True)
    assert torch.equal(other(batch), module(batch))
    before = state(other)
    holder = nn.Module()
    holder.add_module("quantizer", other)
    holder.load_state_dict({})
    assert all(torch.equal(before[name], value) for name, value in state(other).items())


def test_casting_the_model_keeps_float32():
    batch = torch.rand(4, 3)
    module = observed(batch)
    module(batch)
    before = state(module)
    module.to(torch.bfloat16).to(torch.float32)
    assert all(torch.equal(before[name], value) for name, value in state(module).items())
    assert module.half()(batch.half()).dtype == torch.float16
    assert module.log_scale.dtype == torch.float32


def test_the_scale_stays_positive_whatever_the_optimizer_does():
    module = quantizer(minimum_scale=0.01)
    module.set_phase(observing=True, quantizing=True)
    batch = torch.rand(4, 3)
    module(batch)
    for value in (-1e30, 1e3, 0.0):
        with torch.no_grad():
            module.log_scale.fill_(value)
        if value < 88:
            assert module.quantization_parameters().scale.item() >= np.float32(0.01)
            assert bool(module(batch).isfinite().all())


@pytest.mark.parametrize(
    "transform",
    [
        lambda module, input: torch.func.vmap(module)(input),
        lambda module, input: torch.func.grad(lambda values: module(values).sum())(input),
    ],
    ids=["vmap", "grad"],
)
@pytest.mark.parametrize("training", [False, True])
def test_transforms_of_torch_func_are_refused(transform, training):
    batch = torch.linspace(-1, 1, 20).reshape(4, 5)
    module = observed(batch)
    module.set_phase(observing=False, quantizing=True)
    module.train(training)
    with pytest.raises(QuantizationError, match="without the plugin learned_scale"):
        transform(module, batch)


def test_forward_mode_is_refused():
    module = observed(torch.linspace(-1, 1, 20))
    module.set_phase(observing=False, quantizing=True)
    dual_level = torch.autograd.forward_ad.dual_level()
    with dual_level, pytest.raises(QuantizationError, match="without the plugin learned_scale"):
        module(torch.ones(3))


def test_a_paused_quantizer_observes_nothing_in_train_mode_either() -> None:
    module = quantizer()
    module.set_phase(observing=True, quantizing=False)
    module.paused = True
    before = state(module)
    module(torch.randn(4, 5))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.paused = False
    module(torch.randn(4, 5))
    assert module.is_calibrated()
