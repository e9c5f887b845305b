"""Observers keep the same state and answer the same ranges on every device, without waiting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import observer_reference as reference
from compression_manager.quantization import (
    FixedRangeCalibration,
    FixedRangeObserver,
    Observer,
    QuantizationScheme,
    QuantizationSite,
)
from compression_manager.quantization.arithmetic.parameters import compute_qparams
from device_runs import DTYPES, assert_same_bits, assert_same_state, no_waiting

CALIBRATIONS = {**reference.CALIBRATIONS, "fixed": FixedRangeCalibration(-2.0, 1.5)}
EXACT = ("min_max", "moving_average", "fixed")
SCHEMES = {
    "tensor affine": QuantizationScheme(4, False),
    "tensor symmetric": QuantizationScheme(4),
    "channel affine": QuantizationScheme(4, False, "channel", 1),
    "channel symmetric": QuantizationScheme(4, True, "channel", 1),
}

every_kind = pytest.mark.parametrize("kind", list(CALIBRATIONS))
every_scheme = pytest.mark.parametrize("name", list(SCHEMES))


def make(kind: str, of: QuantizationScheme, device: str | torch.device) -> Observer:
    channels = None if of.axis is None else 3
    site = QuantizationSite("conv", "activation", channels, torch.device(device))
    return CALIBRATIONS[kind].make_observer(of, site)


def batches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Growing and shrinking batches, one of which is to be left out, and one empty."""
    found = [torch.randn(16, 3, 5) * size for size in (0.5, 3.0, 0.1, 1.0)]
    found[0] = found[0].relu()
    found.insert(2, torch.full((16, 3, 5), torch.nan))
    found.append(torch.zeros(0, 3, 5))
    return [batch.to(dtype) for batch in found]


def pair(kind: str, name: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """An observer on the device and one on the CPU after the same batches."""
    there, here = make(kind, SCHEMES[name], device), make(kind, SCHEMES[name], "cpu")
    for batch in batches(dtype):
        there.observe(batch.to(device))
        here.observe(batch)
    return there, here


@every_kind
@every_scheme
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_state_equals_the_cpus(kind, name, dtype, device):
    there, here = pair(kind, name, device, dtype)
    assert_same_state(there.state_dict(), here.state_dict())
    assert there.has_observed()


@pytest.mark.parametrize("kind", EXACT)
@every_scheme
def test_the_range_equals_the_cpus(kind, name, device):
    there, here = pair(kind, name, device)
    for got, wanted in zip(there.observed_range(), here.observed_range(), strict=True):
        assert_same_bits(got, wanted)


@every_scheme
def test_a_percentile_equals_the_cpus_to_rounding(name, device):
    """A device may fuse the product and the sum of an interpolation, and round once less."""
    there, here = pair("percentile", name, device)
    for got, wanted in zip(there.observed_range(), here.observed_range(), strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=2.0**-21, atol=0.0)


@every_scheme
def test_a_divergence_has_its_least_at_the_cpus_range(name, device):
    """Logarithms in float64 differ in the last digits, and candidates in far more."""
    there, here = pair("kl_divergence", name, device)
    for got, wanted in zip(there.observed_range(), here.observed_range(), strict=True):
        assert_same_bits(got, wanted)


@every_scheme
def test_a_squared_error_is_the_cpus(name, device):
    """Sums in another order may choose a neighboring candidate, if its error is as small."""
    there, here = pair("squared_error", name, device)
    of = SCHEMES[name]
    values = np.concatenate([batch.numpy() for batch in batches_seen()])
    for row, line in enumerate(reference.lines(values, of.axis)):
        points, counts = reference.centres(line, 256), reference.histogram(line, 256)
        errors = []
        for observer in (there, here):
            low, high = (end.cpu().reshape(-1)[row].item() for end in observer.observed_range())
            errors.append(reference.squared_error(points, counts, low, high, of))
        assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def batches_seen() -> list[torch.Tensor]:
    """The finite batches that `pair` fed, which draws them from the seed of the test."""
    torch.manual_seed(0)
    return [batch for batch in batches() if batch.isfinite().all()]


@pytest.mark.parametrize("kind", ["min_max", "percentile", "squared_error"])
@pytest.mark.parametrize(
    "of",
    [
        QuantizationScheme(4),
        QuantizationScheme(4, False, "channel", 0),
        QuantizationScheme(4, granularity="group", group_size=7),
        QuantizationScheme(4, False, "group", group_size=8),
    ],
    ids=str,
)
def test_the_range_of_a_weight(kind, of, device):
    weight = torch.randn(6, 5, 4)
    channels = None if of.axis is None else 6
    sites = [
        QuantizationSite("conv", "weight", channels, torch.device(at), (6, 5, 4))
        for at in (device, "cpu")
    ]
    there, here = (CALIBRATIONS[kind].make_observer(of, site) for site in sites)
    ranges = there.compute_range(weight.to(device)), here.compute_range(weight)
    for got, wanted in zip(*ranges, strict=True):
        # A searched range is one of few candidates, 2 percent apart.
        tolerance = 0.03 if kind == "squared_error" else 2.0**-21
        torch.testing.assert_close(got.cpu(), wanted, rtol=tolerance, atol=0.0)


@every_kind
@every_scheme
def test_observing_and_asking_never_wait(kind, name, device):
    observer = make(kind, SCHEMES[name], device)
    inputs = [batch.to(device) for batch in batches()]
    with no_waiting(device):
        for batch in inputs:
            observer.observe(batch)
            compute_qparams(*observer.observed_range(), SCHEMES[name])


@every_kind
@every_scheme
def test_every_operation_is_deterministic(kind, name, device, deterministic):
    there, here = pair(kind, name, device)
    there.observed_range()
    assert_same_state(there.state_dict(), here.state_dict())


@pytest.mark.parametrize("kind", [*reference.BINNED, "min_max", "moving_average"])
def test_merges_with_an_observer_on_another_device(kind, device):
    there, here = (make(kind, SCHEMES["tensor affine"], at) for at in (device, "cpu"))
    whole = make(kind, SCHEMES["tensor affine"], "cpu")
    for index, batch in enumerate(batches()):
        (there if index < 3 else here).observe(batch.to(device) if index < 3 else batch)
        whole.observe(batch)
    there.merge(here)
    assert there.minimum.device.type == device.type
    for name, value in whole.state_dict().items():
        # Merged averages are those of one observer up to float32 rounding.
        torch.testing.assert_close(there.state_dict()[name].cpu(), value, rtol=1e-6, atol=1e-6)


def test_a_fixed_range_merges_with_one_on_another_device(device):
    there, here = (make("fixed", SCHEMES["tensor affine"], at) for at in (device, "cpu"))
    assert isinstance(there, FixedRangeObserver)
    there.merge(here)
