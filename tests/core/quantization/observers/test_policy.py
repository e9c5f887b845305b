"""What every observer has in common: NaN, state, shapes, devices."""

import copy

import numpy as np
import pytest
import torch

from compression_manager.errors import QuantizationError
from compression_manager.quantization import ObservedFakeQuantizer, QuantizationSite, choose_qparams
from observer_reference import BINNED, CALIBRATIONS, fed, observer, scheme

KINDS = list(CALIBRATIONS)
ON_WEIGHTS = [kind for kind in KINDS if kind != "kl_divergence"]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def state_of(target):
    return {name: value.clone() for name, value in target.state_dict().items()}


def unchanged(target, before, *, but=()):
    return all(
        torch.equal(before[name], value)
        for name, value in target.state_dict().items()
        if name not in but
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_not_finite_changes_nothing_but_its_count(kind, axis, bad):
    for parts in ([random(6, 3)], []):
        target = fed(observer(kind, scheme(4, axis=axis), 3), parts)
        before = state_of(target)
        batch = random(6, 3, seed=1) * 50
        batch[2, 1] = bad
        fed(target, [batch, np.zeros((0, 3), np.float32)])
        assert unchanged(target, before, but=["batches_skipped"])
        assert target.batches_skipped == 1
        assert target.has_observed() == bool(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_observing_is_in_place_and_resumes(kind):
    whole, first, second = (observer(kind, scheme(4, axis=1), 3) for _ in range(3))
    shapes = {name: value.shape for name, value in whole.named_buffers()}
    addresses = {name: value.data_ptr() for name, value in whole.named_buffers()}
    parts = [random(6, 3, seed=seed) * (1 + seed) for seed in range(6)]
    fed(whole, parts)
    assert {name: value.shape for name, value in whole.named_buffers()} == shapes
    assert {name: value.data_ptr() for name, value in whole.named_buffers()} == addresses
    second.load_state_dict(fed(first, parts[:4]).state_dict())
    assert unchanged(fed(second, parts[4:]), state_of(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_casts_and_copies_keep_the_state(kind):
    target = fed(observer(kind, scheme(4)), [random(50)])
    before = state_of(target)
    for changed in (copy.deepcopy(target).half(), copy.deepcopy(target).double()):
        assert unchanged(changed, before)
        assert torch.equal(
            torch.stack(changed.observed_range()), torch.stack(target.observed_range())
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_have_the_shape_of_the_scales(kind, axis, symmetric):
    of = scheme(4, symmetric, axis)
    batch = torch.tensor(random(5, 3, 4), requires_grad=True)
    target = observer(kind, of, None if axis is None else batch.shape[axis])
    target.observe(batch)
    shape = () if axis is None else (batch.shape[axis],)
    for low, high in (target.observed_range(), target.compute_range(batch)):
        assert low.shape == high.shape == shape
        assert low.dtype == high.dtype == torch.float32
        assert not low.requires_grad
        assert bool((low <= high).all())
        choose_qparams(low, high, of)


@pytest.mark.parametrize("kind", ON_WEIGHTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_per_group(kind, symmetric):
    weight = torch.tensor(random(4, 5, 3))
    of = scheme(4, symmetric, granularity="group", group_size=4)
    site = QuantizationSite("conv", "weight", shape=tuple(weight.shape))
    low, high = CALIBRATIONS[kind].make_observer(of, site).compute_range(weight)
    assert low.shape == high.shape == (4, 4)
    for row in range(4):
        for number in range(4):
            part = weight.reshape(4, -1)[row, 4 * number : 4 * number + 4]
            alone = CALIBRATIONS[kind].make_observer(
                scheme(4, symmetric), QuantizationSite("conv", "weight")
            )
            for end, single in zip((low, high), alone.compute_range(part), strict=True):
                torch.testing.assert_close(end[row, number], single, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ON_WEIGHTS)
def test_compute_range_shows_what_is_not_finite(kind):
    site = QuantizationSite("conv", "weight", 3)
    # So long that a percentile alone would leave the infinity out.
    weight = torch.tensor(random(3, 64))
    weight[1, 2] = torch.nan
    weight[2, 3] = torch.inf
    target = CALIBRATIONS[kind].make_observer(scheme(4, axis=0), site)
    low, high = target.compute_range(weight)
    assert low[0].isfinite()
    assert high[0].isfinite()
    assert low[1].isnan() | high[1].isnan()
    assert not high[2].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_compute_range_changes_nothing_and_takes_empty_tensors(kind):
    target = fed(observer(kind, scheme(4, axis=1), 3), [random(6, 3)])
    before = state_of(target)
    target.compute_range(torch.tensor(random(6, 3) * 9))
    assert all(end.tolist() == [0.0] * 3 for end in target.compute_range(torch.zeros(0, 3)))
    assert unchanged(target, before)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_before_the_first_batch(kind):
    target = observer(kind, scheme(4, axis=1), 3)
    assert all(end.tolist() == [0.0] * 3 for end in target.observed_range())
    assert not target.has_observed()


@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes_are_refused_and_change_nothing(kind):
    target = observer(kind, scheme(4, axis=1), 3)
    for shape in ((2, 4), (3,)):
        with pytest.raises(QuantizationError, match=r"'conv': expected 3 channels along axis 1"):
            target.observe(torch.zeros(shape))
    assert not target.has_observed()
    of = scheme(4, granularity="group", group_size=4)
    site = QuantizationSite("conv", "weight", shape=(2, 8))
    weight = CALIBRATIONS["min_max"].make_observer(of, site)
    with pytest.raises(QuantizationError, match=r"scales of shape \(2, 2\), got .* \(2, 9\)"):
        weight.compute_range(torch.zeros(2, 9))


@pytest.mark.parametrize("kind", BINNED[:2])
def test_weights_keep_no_histogram(kind):
    target = CALIBRATIONS[kind].make_observer(scheme(4), QuantizationSite("conv", "weight"))
    assert "counts" not in dict(target.named_buffers())
    assert [end.item() for end in target.observed_range()] == [0.0, 0.0]
    with pytest.raises(QuantizationError, match=r"weight of layer 'conv'.*compute_range"):
        target.observe(torch.ones(3))


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_read_back_in_a_step(kind):
    """The meta device has no values, so that any read or branch on one raises."""
    site = QuantizationSite("conv", "activation", 3, torch.device("meta"))
    target = CALIBRATIONS[kind].make_observer(scheme(4, axis=1), site)
    target.observe(torch.empty(6, 3, device="meta"))
    low, high = target.observed_range()
    assert low.device.type == high.device.type == "meta"
    assert low.shape == (3,)
    other = CALIBRATIONS[kind].make_observer(scheme(4, axis=1), site)
    target.merge(other)


@pytest.mark.parametrize("kind", ON_WEIGHTS)
def test_no_weight_is_read_back_in_a_step(kind):
    site = QuantizationSite("conv", "weight", 3, torch.device("meta"))
    target = CALIBRATIONS[kind].make_observer(scheme(4, axis=0), site)
    assert target.compute_range(torch.empty(3, 6, device="meta"))[0].shape == (3,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantizer_follows_the_observer(kind):
    of = scheme(4)
    target = observer(kind, of)
    quantizer = ObservedFakeQuantizer(of, QuantizationSite("conv", "activation"), target)
    quantizer.set_phase(observing=True, quantizing=True)
    for seed in range(3):
        quantizer(torch.tensor(random(40, seed=seed)))
    scale, zero_point = choose_qparams(*target.observed_range(), of)
    assert torch.equal(quantizer.scale, scale)
    assert torch.equal(quantizer.zero_point, zero_point)
