"""Observers against brute force in numpy, over many batches."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    MinMaxObserver,
    MovingAverageObserver,
    ObservedFakeQuantizer,
    QuantizationScheme,
    QuantizationSite,
)

SHAPE = (3, 4, 2, 5)
KINDS = ["min_max", "moving_average"]
CONSTANT = 0.3


def make(kind, axis=None, channels=None):
    scheme = QuantizationScheme(8, False, "tensor" if axis is None else "channel", axis)
    if axis is not None and channels is None:
        channels = SHAPE[axis]
    site = QuantizationSite("conv", "activation", channels)
    if kind == "min_max":
        return MinMaxObserver(scheme, site)
    return MovingAverageObserver(scheme, site, CONSTANT)


def brute_force(kind, batches, axis):
    """Return (minimum, maximum, observed, skipped) in float64."""
    ends, observed, skipped = None, 0, 0
    for batch in batches:
        if batch.size == 0:
            continue
        if not np.isfinite(batch).all():
            skipped += 1
            continue
        observed += 1
        lines = (
            batch.reshape(1, -1)
            if axis is None
            else np.moveaxis(batch, axis, 0).reshape(batch.shape[axis], -1)
        )
        present = np.array([[min(line), max(line)] for line in lines.astype(np.float64)]).T
        if ends is None:
            ends = present
        elif kind == "min_max":
            ends = np.stack([np.minimum(ends[0], present[0]), np.maximum(ends[1], present[1])])
        else:
            ends = ends + CONSTANT * (present - ends)
    if ends is None:
        ends = np.zeros((2, 1 if axis is None else batches[0].shape[axis]))
    return (*ends, observed, skipped)


def check(observer, kind, batches, axis):
    low, high, observed, skipped = brute_force(kind, batches, axis)
    found_low, found_high = observer.observed_range()
    assert found_low.dtype == found_high.dtype == torch.float32
    assert found_low.shape == found_high.shape == (() if axis is None else low.shape)
    exact = kind == "min_max"
    tolerance = {"rtol": 0.0 if exact else 1e-5, "atol": 0.0 if exact else 1e-5}
    np.testing.assert_allclose(found_low.reshape(-1), low, **tolerance)
    np.testing.assert_allclose(found_high.reshape(-1), high, **tolerance)
    assert observer.batches_observed == observed
    assert observer.batches_skipped == skipped
    assert observer.has_observed() == (observed > 0)


numbers = st.floats(-100, 100, width=32)
anything = numbers | st.sampled_from([np.nan, np.inf, -np.inf])


def batches_of(elements):
    clean = hnp.arrays(np.float32, SHAPE, elements=numbers, fill=numbers)
    dirty = hnp.arrays(np.float32, SHAPE, elements=elements, fill=st.just(1.0))
    empty = st.just(np.zeros((0, *SHAPE[1:]), np.float32))
    return st.lists(clean | dirty | empty, min_size=1, max_size=8)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=80)
@given(batches=batches_of(anything), axis=st.sampled_from([None, 1, 2, 3, -1, -3]))
def test_equals_brute_force(kind, batches, axis):
    observer = make(kind, axis)
    for batch in batches:
        observer.observe(torch.tensor(batch))
    check(observer, kind, batches, axis)


@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3, -1, -4])
@pytest.mark.parametrize("kind", KINDS)
def test_many_batches(kind, axis):
    generator = np.random.default_rng(0)
    batches = [generator.normal(size=SHAPE).astype(np.float32) * (1 + i % 7) for i in range(60)]
    batches[0][1, 2, 0, 3] = np.nan
    batches[17][0, 0, 0, 0] = np.inf
    batches[18][2, 3, 1, 4] = -np.inf
    observer = make(kind, axis)
    addresses = {name: value.data_ptr() for name, value in observer.named_buffers()}
    for batch in batches:
        observer.observe(torch.tensor(batch))
    check(observer, kind, batches, axis)
    assert observer.batches_skipped == 3
    assert {name: value.data_ptr() for name, value in observer.named_buffers()} == addresses


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_single_numbers(kind):
    per_channel = make(kind, 0, 3)
    per_channel.observe(torch.tensor([1.0, -2.0, 3.0]))
    assert per_channel.minimum.tolist() == per_channel.maximum.tolist() == [1.0, -2.0, 3.0]
    per_tensor = make(kind)
    per_tensor.observe(torch.tensor(4.0))
    assert per_tensor.minimum == per_tensor.maximum == 4.0


@pytest.mark.parametrize("constant", [0.0, -0.1, 5.0, float("nan")])
def test_a_share_of_a_batch_that_is_none_is_refused(constant):
    site = QuantizationSite("fc", "activation")
    with pytest.raises(QuantizationError, match=r"fc.*above 0 and at most 1, got"):
        MovingAverageObserver(QuantizationScheme(), site, constant)


def test_a_share_of_one_forgets_all_batches_but_the_last():
    site = QuantizationSite("conv", "activation")
    observer = MovingAverageObserver(QuantizationScheme(), site, 1.0)
    for batch in ([-3.0, 5.0], [-1.0, 2.0]):
        observer.observe(torch.tensor(batch))
    assert [end.item() for end in observer.observed_range()] == [-1.0, 2.0]


@pytest.mark.parametrize("scheme", [QuantizationScheme(8), QuantizationScheme(8, False)], ids=str)
@pytest.mark.parametrize("kind", [MinMaxObserver, MovingAverageObserver])
def test_ends_that_are_known_give_the_numbers_of_the_whole_batch(kind, scheme):
    site, batch = QuantizationSite("conv", "activation"), torch.tensor([-2.0, 0.5, 4.0])
    by_batch, by_ends = (ObservedFakeQuantizer(scheme, site, kind(scheme, site)) for _ in range(2))
    for quantizer in (by_batch, by_ends):
        quantizer.set_phase(observing=True, quantizing=True)
    by_batch.follow(batch)
    numbers = by_ends.follow_ends(batch, -2.0, 4.0)
    assert numbers == (by_batch.scale.item(), by_batch.zero_point.item())
    assert numbers == (by_ends.scale.item(), by_ends.zero_point.item())


@pytest.mark.parametrize("kind", [MinMaxObserver, MovingAverageObserver])
def test_a_subclass_with_its_own_way_to_observe_is_shown_whole_batches(kind):
    class Halving(kind):
        def observe(self, input):
            super().observe(input / 2)

    scheme, site = QuantizationScheme(8, False), QuantizationSite("conv", "activation")
    quantizer = ObservedFakeQuantizer(scheme, site, Halving(scheme, site))
    quantizer.set_phase(observing=True, quantizing=True)
    quantizer.follow_ends(torch.tensor([-2.0, 4.0]), -2.0, 4.0)
    assert [end.item() for end in quantizer.observer.observed_range()] == [-1.0, 2.0]


def test_equals_torch_moving_average():
    observers = pytest.importorskip("torch.ao.quantization.observer")
    theirs = observers.MovingAverageMinMaxObserver(averaging_constant=CONSTANT)
    ours = make("moving_average")
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        batch = torch.randn(16, generator=generator)
        theirs(batch)
        ours.observe(batch)
    assert torch.equal(ours.minimum, theirs.min_val)
    assert torch.equal(ours.maximum, theirs.max_val)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_values_give_a_usable_range(kind):
    observer = make(kind)
    for _ in range(5):
        observer.observe(torch.full((4, 4), 2.5))
    assert observer.minimum == observer.maximum == 2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_kept_as_float32(dtype):
    observer = make("min_max", 1)
    x = torch.randn(SHAPE).to(dtype)
    observer.observe(x)
    assert torch.equal(observer.minimum, x.amin((0, 2, 3)).float())
    assert observer.minimum.dtype == torch.float32


def test_a_number_beyond_float32_counts_as_infinite():
    observer = make("min_max")
    observer.observe(torch.tensor([1e300, 0.0], dtype=torch.float64))
    assert observer.batches_skipped == 1
    assert not observer.has_observed()


@pytest.mark.parametrize("kind", KINDS)
def test_compute_range_changes_nothing(kind):
    observer = make(kind, 1)
    observer.observe(torch.randn(SHAPE))
    before = {name: value.clone() for name, value in observer.state_dict().items()}
    x = (torch.randn(SHAPE) * 50).requires_grad_()
    low, high = observer.compute_range(x)
    assert torch.equal(low, x.detach().amin((0, 2, 3)))
    assert torch.equal(high, x.detach().amax((0, 2, 3)))
    assert not low.requires_grad
    for name, value in observer.state_dict().items():
        assert torch.equal(before[name], value)


def test_compute_range_shows_what_is_not_finite_and_takes_empty_tensors():
    assert make("min_max").compute_range(torch.tensor([1.0, float("nan")]))[0].isnan()
    low, high = make("min_max", 1).compute_range(torch.zeros(0, 4, 2, 5))
    assert low.tolist() == high.tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_range_is_no_view_of_the_batch(kind):
    observer = make(kind, 0, 3)
    batch = torch.tensor([1.0, 2.0, 3.0])
    observer.observe(batch)
    batch.zero_()
    assert observer.minimum.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("kind", KINDS)
def test_continues_from_its_state(kind):
    batches = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    whole, first, second = (make(kind, 1) for _ in range(3))
    for batch in batches:
        whole.observe(batch)
    for batch in batches[:5]:
        first.observe(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[5:]:
        second.observe(batch)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_casting_and_copying_keep_the_range():
    observer = make("min_max", 1)
    observer.observe(torch.randn(SHAPE))
    before = {name: value.clone() for name, value in observer.state_dict().items()}
    for changed in (copy.deepcopy(observer).half(), copy.deepcopy(observer).double()):
        for name, value in changed.state_dict().items():
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("shape", [(3, 5, 2, 5), (4,)])
def test_a_missing_or_wrong_channel_axis_is_refused(shape):
    observer = make("min_max", 1)
    with pytest.raises(QuantizationError, match=r"layer 'conv'.*expected 4 channels along axis 1"):
        observer.observe(torch.zeros(shape))
    assert not observer.has_observed()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_does_not_update(kind):
    observer = make(kind)
    scheme = QuantizationScheme(8, False)
    quantizer = ObservedFakeQuantizer(scheme, QuantizationSite("conv", "activation"), observer)
    quantizer.set_phase(observing=True, quantizing=True)
    quantizer(torch.randn(SHAPE))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.eval()
    quantizer(torch.randn(SHAPE) * 100)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(before[name], value), name
    quantizer.train()
    quantizer(torch.randn(SHAPE) * 100)
    assert observer.batches_observed == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_batch_leaves_the_scale_of_a_quantizer(kind):
    scheme = QuantizationScheme(8, False)
    quantizer = ObservedFakeQuantizer(scheme, QuantizationSite("conv", "activation"), make(kind))
    quantizer.set_phase(observing=True, quantizing=True)
    quantizer(torch.randn(SHAPE))
    scale = quantizer.scale.clone()
    output = quantizer(torch.tensor([1.0, float("nan"), float("inf")]))
    assert torch.equal(quantizer.scale, scale)
    assert output.isnan().tolist() == [False, True, False]
