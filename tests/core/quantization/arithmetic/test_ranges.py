"""Smallest and largest values for every granularity, against numpy, one scale at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compression_manager.errors import QuantizationError
from compression_manager.quantization import QuantizationScheme, QuantizationSite
from compression_manager.quantization.arithmetic.ranges import range_shape, tensor_range

arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5),
    elements=st.floats(-1e6, 1e6, width=32),
)


def parts(x, scheme):
    """The values that share a scale, by the index of the scale."""
    if scheme.granularity == "tensor":
        return {(): x}
    if scheme.granularity == "channel":
        return {(index,): np.take(x, index, scheme.axis) for index in range(x.shape[scheme.axis])}
    if scheme.granularity == "token":
        return {(*index, 0): x[index] for index in np.ndindex(*x.shape[:-1])}
    size = scheme.group_size
    return {
        (row, group): x[row].reshape(-1)[group * size : (group + 1) * size]
        for row in range(x.shape[0])
        for group in range(-(-x[row].size // size))
    }


@settings(deadline=None, max_examples=200)
@given(arrays, st.data())
def test_equals_numpy(x, data):
    scheme = data.draw(
        st.sampled_from(
            [
                QuantizationScheme(),
                QuantizationScheme(granularity="token", dynamic=True),
                *(QuantizationScheme(granularity="channel", axis=axis) for axis in range(x.ndim)),
                QuantizationScheme(granularity="channel", axis=-1),
                *(QuantizationScheme(granularity="group", group_size=n) for n in (1, 2, 3, 7)),
            ]
        )
    )
    minimum, maximum = tensor_range(torch.tensor(x), scheme)
    expected = parts(x, scheme)
    assert minimum.shape == maximum.shape == range_shape(scheme, x.shape)
    assert minimum.numel() == len(expected)
    for index, values in expected.items():
        assert (minimum[index].item(), maximum[index].item()) == (values.min(), values.max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_ranges_are_float32_without_gradient(dtype):
    x = torch.randn(4, 6).to(dtype).requires_grad_()
    for scheme in (QuantizationScheme(), QuantizationScheme(granularity="group", group_size=4)):
        minimum, _ = tensor_range(x, scheme)
        assert minimum.dtype == torch.float32
        assert not minimum.requires_grad


def test_layouts_do_not_matter():
    x = torch.randn(2, 6, 5, 4)
    for scheme in (
        QuantizationScheme(granularity="group", group_size=7),
        QuantizationScheme(granularity="channel", axis=1),
    ):
        expected = tensor_range(x, scheme)
        for other in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            assert all(map(torch.equal, tensor_range(other, scheme), expected))


def test_empty_tensors_have_a_range_of_zero_and_nan_shows():
    group = QuantizationScheme(granularity="group", group_size=2)
    assert tensor_range(torch.empty(0), QuantizationScheme())[0].tolist() == 0.0
    assert tensor_range(torch.empty(0, 4), group)[0].shape == (0, 2)
    x = torch.tensor([[1.0, 2.0, float("nan"), 4.0]])
    assert tensor_range(x, group)[0].isnan().tolist() == [[False, True]]


def test_shapes_without_the_axis_are_refused():
    with pytest.raises(QuantizationError, match=r"axis 2 does not exist .*\(2, 3\)"):
        tensor_range(torch.ones(2, 3), QuantizationScheme(granularity="channel", axis=2))
    with pytest.raises(QuantizationError, match=r"axis -3 does not exist .*\(2, 3\)"):
        tensor_range(torch.ones(2, 3), QuantizationScheme(granularity="channel", axis=-3))
    with pytest.raises(QuantizationError, match="'group' needs a tensor of at least one dim"):
        tensor_range(torch.ones(()), QuantizationScheme(granularity="group"))


def test_a_site_knows_the_shape_of_its_scales():
    group = QuantizationScheme(granularity="group", group_size=4)
    site = QuantizationSite("fc", "weight", shape=(3, 10))
    assert site.range_shape(group) == (3, 3)
    assert site.range_shape(QuantizationScheme(granularity="channel", axis=1)) == (10,)
    assert QuantizationSite("fc", "weight", 5).range_shape(
        QuantizationScheme(granularity="channel")
    ) == (5,)
    with pytest.raises(QuantizationError, match="of 4 needs the tensor's shape"):
        QuantizationSite("fc", "activation").range_shape(group)
