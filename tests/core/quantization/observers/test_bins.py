"""The histogram: exact counts however the values are divided, ordered and scaled."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compression_manager.quantization.observers.bins import make_layout
from observer_reference import CALIBRATIONS, bin_width, fed, histogram, lines, observer, scheme

BINS = 256
SHAPE = (2, 3, 4)

magnitudes = st.sampled_from([0.0, 1e-40, 1e-30, 1e-6, 0.3, 1.0, 2.0, 77.0, 1e9, 3e38])
numbers = st.builds(
    lambda size, factor: float(np.float32(size * factor)),
    magnitudes,
    st.sampled_from([1.0, -1.0, 0.5, -0.25, 0.7]),
)
batches = st.lists(hnp.arrays(np.float32, SHAPE, elements=numbers), min_size=1, max_size=6)


def check(found, values, axis):
    counts = found.counts.numpy().reshape(-1, BINS)
    for row, line in zip(counts, lines(values, axis), strict=True):
        np.testing.assert_array_equal(row, histogram(line, BINS))


@settings(deadline=None, max_examples=60)
@given(batches=batches, axis=st.sampled_from([None, 0, 1, -1]))
def test_counts_equal_those_of_all_values_at_once(batches, axis):
    of = scheme(axis=axis)
    target = observer("percentile", of, None if axis is None else SHAPE[axis])
    fed(target, batches)
    moved = [np.moveaxis(batch, axis or 0, 0) for batch in batches]
    check(target, np.concatenate(moved, 1), None if axis is None else 0)


@pytest.mark.parametrize("axis", [None, 1])
def test_growing_ranges(axis):
    generator = np.random.default_rng(0)
    parts = [(generator.normal(size=(50, 3)) * 3.0**i).astype(np.float32) for i in range(-8, 9)]
    target = fed(observer("percentile", scheme(axis=axis), 3), parts)
    check(target, np.concatenate(parts), axis)
    assert int(target.counts.sum()) == 17 * 150
    backwards = fed(observer("percentile", scheme(axis=axis), 3), parts[::-1])
    assert torch.equal(target.counts, backwards.counts)


@pytest.mark.parametrize("bins", [128, 129, 200, 256, 2048])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 0.0),
        (0.0, 1.0),
        (-1.0, 1.0),
        (-1.0, 0.0),
        (100.0, 101.0),
        (-3.4e38, 3.4e38),
        (0.0, 1e-45),
        (-1e-39, 1e-38),
        (-0.17, 6.3),
        (0.0, 0.99999994),
        (-1e-6, 0.99999994),
        (-0.5, 0.49999997),
        (-0.001, 127.99999),
    ],
)
def test_layout_is_the_finest_that_fits(low, high, bins):
    values = np.array([low, high], np.float32)
    layout = make_layout(*torch.tensor(values).reshape(2, 1), bins)
    width, first = bin_width(values, bins)
    assert layout.width().double().item() == width
    assert layout.first.item() == first
    extent = max(float(values[1]), 0.0) - min(float(values[0]), 0.0)
    if extent > 1e-30:
        assert width < 2 * extent / (bins - 1)


def test_half_precision_and_channels_last_count_alike():
    x = torch.randn(4, 3, 5, 5).half()
    first = fed(observer("percentile", scheme(axis=1), 3), [x.float().numpy()])
    second = observer("percentile", scheme(axis=1), 3)
    second.observe(x.to(memory_format=torch.channels_last))
    assert torch.equal(first.counts, second.counts)


def test_groups_of_unequal_length_count_no_padding():
    from compression_manager.quantization import QuantizationSite

    of = scheme(granularity="group", group_size=3)
    site = QuantizationSite("conv", "activation", shape=(2, 5))
    target = CALIBRATIONS["percentile"].make_observer(of, site)
    target.observe(torch.randn(2, 5))
    assert target.counts.shape == (2, 2, 256)
    assert target.counts.sum(-1).tolist() == [[3, 2], [3, 2]]
