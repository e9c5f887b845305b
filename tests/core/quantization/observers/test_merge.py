"""Merging observers of two halves gives the observer of the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    HistogramCalibration,
    MinMaxObserver,
    MovingAverageCalibration,
    Observer,
    PercentileCalibration,
    QuantizationSite,
)
from observer_reference import BINNED, CALIBRATIONS, fed, observer, scheme

KINDS = list(CALIBRATIONS)


def batches(seed=0, count=12):
    generator = np.random.default_rng(seed)
    parts = [
        (generator.normal(size=(8, 3)) * generator.uniform(0.1, 30)).astype(np.float32)
        for _ in range(count)
    ]
    parts[3][0, 0] = np.nan
    parts[-1][0, 0] = np.inf
    return parts


def check(merged, whole, kind):
    state, expected = merged.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if kind == "moving_average" and value.is_floating_point():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(state[name], value), name
    if kind != "moving_average":
        assert torch.equal(
            torch.stack(merged.observed_range()), torch.stack(whole.observed_range())
        )


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 99), cut=st.integers(0, 12), second=st.integers(0, 12))
def test_parts_make_the_whole(kind, axis, seed, cut, second):
    parts = batches(seed)
    cut, second = sorted((cut, second))
    of = scheme(4, False, axis)
    whole = fed(observer(kind, of, 3), parts)
    merged = fed(observer(kind, of, 3), parts[:cut])
    for rest in (parts[cut:second], parts[second:]):
        other = fed(observer(kind, of, 3), rest)
        before = {name: value.clone() for name, value in other.state_dict().items()}
        merged.merge(other)
        for name, value in other.state_dict().items():
            assert torch.equal(before[name], value)
    check(merged, whole, kind)
    # What was merged goes on like what saw everything.
    fed(merged, parts[:2])
    fed(whole, parts[:2])
    check(merged, whole, kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "moving_average"])
def test_the_order_does_not_matter(kind):
    parts = batches()
    first, second = (observer(kind, scheme(4, True)) for _ in range(2))
    fed(first, parts[:5]).merge(fed(observer(kind, scheme(4, True)), parts[5:]))
    fed(second, parts[5:]).merge(fed(observer(kind, scheme(4, True)), parts[:5]))
    check(first, second, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_observer_adds_nothing(kind):
    positive = [np.linspace(3.0, 5.0, 50, dtype=np.float32)]
    target = fed(observer(kind, scheme(4)), positive)
    target.merge(observer(kind, scheme(4)))
    check(target, fed(observer(kind, scheme(4)), positive), kind)
    assert target.minimum == 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_merging_in_place_keeps_buffers(kind):
    target, other = (fed(observer(kind, scheme(4)), batches(seed)) for seed in (1, 2))
    addresses = {name: value.data_ptr() for name, value in target.named_buffers()}
    target.merge(other)
    assert {name: value.data_ptr() for name, value in target.named_buffers()} == addresses


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (MovingAverageCalibration(0.1), MovingAverageCalibration(0.2), "averaging_constant"),
        (PercentileCalibration(99.0), PercentileCalibration(98.0), "different percentile: 99.0"),
        (PercentileCalibration(bins=128), PercentileCalibration(bins=256), "different bins: 128"),
        (HistogramCalibration(), HistogramCalibration("kl_divergence"), "different objective"),
        (HistogramCalibration(), PercentileCalibration(), "own kind only, got a Percentile"),
    ],
)
def test_other_settings_are_refused(mine, theirs, message):
    target = fed(observer(mine, scheme(4)), batches())
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(QuantizationError, match=f"layer 'conv'.*{message}"):
        target.merge(fed(observer(theirs, scheme(4)), batches(1)))
    for name, value in target.state_dict().items():
        assert torch.equal(before[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_other_schemes_and_shapes_are_refused(kind):
    target = observer(kind, scheme(4, axis=1), 3)
    with pytest.raises(QuantizationError, match="different scheme: int4 affine"):
        target.merge(observer(kind, scheme(4, True, 1), 3))
    with pytest.raises(QuantizationError, match=r"different shape: \(3,\) here, \(5,\)"):
        target.merge(observer(kind, scheme(4, axis=1), 5))


@pytest.mark.parametrize("kind", BINNED[:2])
def test_weights_have_nothing_to_merge(kind):
    site = QuantizationSite("conv", "weight")
    first, second = (CALIBRATIONS[kind].make_observer(scheme(4), site) for _ in range(2))
    first.merge(second)
    assert not first.has_observed()


class Minimal(Observer):
    def observe(self, input: Tensor) -> None: ...

    def compute_range(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return input.amin(), input.amax()

    def observed_range(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(()), torch.zeros(())

    def has_observed(self) -> bool:
        return False


def test_a_subclass_is_another_kind():
    class Other(MinMaxObserver):
        """May keep more than its base, which would get lost."""

    site = QuantizationSite("conv", "activation")
    with pytest.raises(QuantizationError, match="own kind only, got a Other"):
        MinMaxObserver(scheme(), site).merge(Other(scheme(), site))


def test_third_parties_get_a_clear_error():
    with pytest.raises(QuantizationError, match=r"Minimal cannot be merged.*Observer\.merge"):
        Minimal().merge(Minimal())
