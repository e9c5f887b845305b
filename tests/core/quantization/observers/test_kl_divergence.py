"""The least divergence against TensorRT's convention written bin by bin."""

import numpy as np
import pytest
import torch

from compression_manager.errors import QuantizationError
from compression_manager.quantization import HistogramCalibration, QuantizationSite
from observer_reference import fed, least_divergence, lines, observer, scheme


def normal(generator, shape):
    return generator.normal(size=shape)


def rectified(generator, shape):
    return np.maximum(generator.normal(size=shape), 0)


def negative(generator, shape):
    return -np.abs(generator.standard_t(4, size=shape))


def outliers(generator, shape):
    return generator.standard_t(3, size=shape)


@pytest.mark.parametrize(("bits", "bins"), [(4, 256), (4, 1024), (6, 512), (8, 2048)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("draw", [normal, rectified, negative, outliers])
def test_equals_the_search_bin_by_bin(draw, symmetric, bits, bins):
    generator = np.random.default_rng(8)
    parts = [draw(generator, (3000,)).astype(np.float32) for _ in range(3)]
    of = scheme(bits, symmetric)
    target = fed(observer(HistogramCalibration("kl_divergence", bins), of), parts)
    everything = np.concatenate(parts)
    clip = least_divergence(everything, bins, of)
    low, high = target.observed_range()
    assert low.item() == max(-clip, min(float(everything.min()), 0.0))
    assert high.item() == min(clip, max(float(everything.max()), 0.0))


def test_clips_outliers_but_not_a_uniform_distribution():
    generator = np.random.default_rng(9)
    heavy = generator.standard_t(2, size=50_000).astype(np.float32)
    of = scheme(8, True)
    calibration = HistogramCalibration("kl_divergence")
    found = fed(observer(calibration, of), [heavy]).observed_range()[1]
    assert found < 0.5 * np.abs(heavy).max()
    flat = generator.uniform(0, 1, size=50_000).astype(np.float32)
    assert fed(observer(calibration, of), [flat]).observed_range()[1] > 0.97


def test_zeros_do_not_decide():
    """A layer that is mostly off has the range of what is on."""
    generator = np.random.default_rng(10)
    on = np.abs(generator.normal(size=20_000)).astype(np.float32)
    sparse = np.concatenate([on, np.zeros(500_000, np.float32)])
    calibration, of = HistogramCalibration("kl_divergence"), scheme(8, False, signed=False)
    ends = [fed(observer(calibration, of), [x]).observed_range()[1] for x in (on, sparse)]
    assert ends[1] == pytest.approx(ends[0].item(), rel=0.02)


def test_per_channel_equals_each_channel_alone():
    x = np.random.default_rng(11).standard_t(3, size=(2000, 3)).astype(np.float32)
    x[:, 1] = np.abs(x[:, 1])
    calibration = HistogramCalibration("kl_divergence", 256)
    together = fed(observer(calibration, scheme(4, False, 1), 3), [x])
    for channel, line in enumerate(lines(x, 1)):
        alone = fed(observer(calibration, scheme(4, False)), [line])
        for end, single in zip(together.observed_range(), alone.observed_range(), strict=True):
            assert end[channel] == single


def test_in_blocks_equals_at_once(monkeypatch):
    from compression_manager.quantization.observers import kl_divergence

    x = np.random.default_rng(12).standard_t(3, size=3000).astype(np.float32)
    target = fed(observer(HistogramCalibration("kl_divergence"), scheme(8, True)), [x])
    at_once = target.observed_range()
    monkeypatch.setattr(kl_divergence, "_BLOCK", 5000)
    assert torch.equal(torch.stack(target.observed_range()), torch.stack(at_once))


def test_equal_values_keep_their_range():
    for value in (0.0, 3.0, -3.0):
        batch = [np.full(9, value, np.float32)]
        target = fed(observer(HistogramCalibration("kl_divergence"), scheme(8)), batch)
        assert [end.item() for end in target.observed_range()] == [min(value, 0), max(value, 0)]


def test_a_range_of_its_own_for_one_tensor():
    x = np.random.default_rng(13).standard_t(3, size=3000).astype(np.float32)
    target = observer(HistogramCalibration("kl_divergence"), scheme(8, True))
    alone = target.compute_range(torch.tensor(x))
    assert not target.has_observed()
    assert torch.equal(torch.stack(alone), torch.stack(fed(target, [x]).observed_range()))


@pytest.mark.parametrize(
    ("role", "bits", "message"),
    [("weight", 8, "is for activations.*'squared_error'"), ("activation", 1, "at least 2 bits")],
)
def test_refused(role, bits, message):
    with pytest.raises(QuantizationError, match=message):
        HistogramCalibration("kl_divergence").make_observer(
            scheme(bits), QuantizationSite("fc", role)
        )
