"""Scales and zero points against an independent computation and against torch's observers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    QuantizationParameters,
    QuantizationScheme,
    choose_qparams,
    dequantize,
    fake_quantize,
)
from compression_manager.quantization.arithmetic.parameters import check_range, compute_qparams

EPS = np.finfo(np.float32).eps
FLOAT32_MAX = float(np.finfo(np.float32).max)
# What the outermost integer may stand for: the maximum, with room for rounding.
MAX_LEVEL = FLOAT32_MAX * (1 - 2.0**-22)
finite = st.floats(-1e6, 1e6, width=32) | st.floats(
    -FLOAT32_MAX, FLOAT32_MAX, width=32, allow_nan=False
)
ranges = st.tuples(finite, finite).map(sorted)
schemes = st.builds(
    QuantizationScheme, bits=st.integers(1, 32), symmetric=st.booleans(), signed=st.booleans()
) | st.builds(
    QuantizationScheme,
    bits=st.integers(2, 32),
    symmetric=st.booleans(),
    signed=st.booleans(),
    narrow_range=st.booleans(),
)


def floor(scheme):
    return EPS if scheme.bits <= 24 else np.finfo(np.float32).tiny


def reference(low, high, scheme):
    """The formula in numpy, one number at a time."""
    real = np.float32 if scheme.bits <= 24 else np.float64
    low, high = real(min(low, 0.0)), real(max(high, 0.0))
    levels = 2**scheme.bits
    if scheme.symmetric:
        if scheme.bits == 1:
            scale = max(np.float32(max(-low, high)), floor(scheme))
            return min(scale, np.float32(MAX_LEVEL)), 0
        narrow = scheme.narrow_range in (None, True)
        steps, farthest = (levels // 2 - 1,) * 2 if narrow else ((levels - 1) / 2, levels // 2)
        scale = max(np.float32(max(-low, high) / real(steps)), floor(scheme))
        return min(scale, np.float32(MAX_LEVEL / farthest)), 0 if scheme.signed else levels // 2
    first = -(levels // 2) if scheme.signed else 0
    last = first + levels - 1
    first += bool(scheme.narrow_range)
    # Twice the quotient, because twice the half of an extent may exceed float32.
    scale = np.float32((high / real(2) - low / real(2)) / real((last - first) / 2))
    scale = max(scale, floor(scheme))
    zero_point = min(max(first - int(np.rint(low / real(scale))), first), last)
    farthest = real(max(last - zero_point, zero_point - first))
    return min(scale, np.float32(real(1) / farthest * real(MAX_LEVEL))), zero_point


@settings(deadline=None, max_examples=300)
@given(ranges, schemes)
def test_equals_numpy_bit_for_bit(limits, scheme):
    scale, zero_point = choose_qparams(*(torch.tensor(limit) for limit in limits), scheme)
    expected_scale, expected_zero_point = reference(*limits, scheme)
    assert scale.item() == expected_scale
    assert zero_point.item() == expected_zero_point
    assert scale.shape == zero_point.shape == ()
    assert scale.dtype == torch.float32
    assert zero_point.dtype == (torch.int64 if scheme.bits > 24 else torch.int32)


@pytest.mark.parametrize("limits", [(-1.0, 2), (-0.1, 0.3)])
@pytest.mark.parametrize("bits", [8, 28, 32])
def test_a_range_of_plain_numbers(bits, limits):
    scheme = QuantizationScheme(bits, False)
    scale, zero_point = choose_qparams(*limits, scheme)
    assert (scale.item(), zero_point.item()) == reference(*limits, scheme)


@pytest.mark.parametrize("bits", [2, 8, 28])
def test_the_widest_range_has_a_finite_scale(bits):
    scheme = QuantizationScheme(bits, False)
    limits = (-FLOAT32_MAX, FLOAT32_MAX)
    scale, zero_point = choose_qparams(*(torch.tensor(limit) for limit in limits), scheme)
    assert (scale.item(), zero_point.item()) == reference(*limits, scheme)
    assert scale.isfinite()


@settings(deadline=None, max_examples=200)
@given(ranges, schemes)
def test_range_is_covered_and_zero_is_exact(limits, scheme):
    low, high = limits
    scale, zero_point = (
        value.double().item()
        for value in choose_qparams(torch.tensor(low), torch.tensor(high), scheme)
    )
    assert scale > 0
    assert scheme.quant_min <= zero_point <= scheme.quant_max
    # Half a step at each end, for the rounding of the zero point, and float32's own rounding.
    slack = 0.51 * scale + 1e-6 * max(abs(low), abs(high))
    if max(abs(low), abs(high)) + 1.01 * scale > FLOAT32_MAX:
        slack += 0.51 * scale
    if scheme.symmetric and scheme.bits == 1:
        assert scale == pytest.approx(max(abs(low), abs(high), EPS), rel=1e-6)
        return
    assert (scheme.quant_min - zero_point) * scale <= min(low, 0.0) + slack
    assert (scheme.quant_max - zero_point) * scale >= max(high, 0.0) - slack


def test_per_channel_equals_one_range_at_a_time():
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(2, 64, generator=generator).sort(dim=0).values
    for scheme in (
        QuantizationScheme(granularity="channel"),
        QuantizationScheme(8, False, "channel", signed=False),
        QuantizationScheme(28, False, "channel"),
    ):
        scale, zero_point = choose_qparams(low, high, scheme)
        assert scale.shape == zero_point.shape == (64,)
        for channel in range(64):
            expected = reference(low[channel].item(), high[channel].item(), scheme)
            assert (scale[channel].item(), zero_point[channel].item()) == expected


@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_torch_observers(symmetric):
    # Deprecated upstream, so that the comparison goes when the module does.
    observers = pytest.importorskip("torch.ao.quantization.observer")
    mode = "symmetric" if symmetric else "affine"
    generator = torch.Generator().manual_seed(1)
    low, high = (torch.randn(2, 2000, generator=generator) * 3).sort(dim=0).values
    # torch puts the zero of unsigned symmetric integers elsewhere when their range is given.
    for signed, narrow in [(True, None), (True, not symmetric), (symmetric, None)]:
        scheme = QuantizationScheme(8, symmetric, "channel", signed=signed, narrow_range=narrow)
        observer = observers.PerChannelMinMaxObserver(
            dtype=torch.qint8 if signed else torch.quint8,
            qscheme=getattr(torch, f"per_channel_{mode}"),
            quant_min=scheme.quant_min,
            quant_max=scheme.quant_max,
        )
        expected_scale, expected_zero_point = observer._calculate_qparams(low, high)
        scale, zero_point = choose_qparams(low, high, scheme)
        torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0)
        assert torch.equal(zero_point.long(), expected_zero_point.long())


extreme = st.sampled_from([0.0, 1.0, 0.25, 0.5, 0.999, 1 - 2**-24]).map(
    lambda share: float(np.float32(share * FLOAT32_MAX))
)
extreme_ranges = ranges | st.tuples(extreme.map(lambda x: -x), extreme | finite).map(sorted)


@settings(deadline=None, max_examples=500)
@given(extreme_ranges, schemes, st.lists(finite | extreme, max_size=4))
def test_nothing_overflows(limits, scheme, others):
    """Values are off by half a step, at the ends by one; beyond them, as far as they were cut."""
    low, high = limits
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), scheme)
    values = torch.tensor([0.0, low, high, FLOAT32_MAX, -FLOAT32_MAX, *others])
    quantized = fake_quantize(values, scale, zero_point, scheme.quant_min, scheme.quant_max)
    assert quantized.isfinite().all()
    assert quantized[0] == 0.0
    levels = torch.tensor([scheme.quant_min, scheme.quant_max])
    bottom, top = dequantize(levels, scale, zero_point).double()
    assert bottom.isfinite()
    assert top.isfinite()
    exact, step = values.double(), scale.double()
    inside = exact.clamp(bottom, top)
    rounding = 2.0**-21 * exact.abs()
    assert ((quantized.double() - inside).abs() <= 0.5 * step + rounding).all()
    if scheme.bits > 1 or not scheme.symmetric:
        # The scale is a float32, and bounded with a share of 2^-22: both move a far end by a part
        # of the extent, which with many bits is more than a step.
        scale_rounding = 2.0**-21 * (exact[2].clamp(min=0) - exact[1].clamp(max=0))
        ends = exact[1:3]
        assert ((ends - ends.clamp(bottom, top)).abs() <= step + scale_rounding).all()


@pytest.mark.parametrize("bits", [1, 4, 8, 28])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("limits", [(-1.0, np.inf), (-np.inf, 1.0), (-np.inf, np.inf)])
def test_an_infinite_range_has_no_scale(bits, symmetric, limits):
    scheme = QuantizationScheme(bits, symmetric)
    scale, zero_point = compute_qparams(*(torch.tensor(limit) for limit in limits), scheme)
    assert scale.isnan()
    x = torch.tensor([1.0, *limits])
    assert fake_quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max).isnan().all()


@pytest.mark.parametrize("value", [0.0, 1e-30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_range_without_extent_gets_a_positive_scale(value, symmetric):
    scheme = QuantizationScheme(8, symmetric, signed=symmetric)
    scale, zero_point = choose_qparams(torch.tensor(value), torch.tensor(value), scheme)
    assert scale.item() == EPS
    assert zero_point.item() == 0


def test_known_numbers():
    symmetric = choose_qparams(torch.tensor(-2.54), torch.tensor(1.0), QuantizationScheme())
    assert symmetric[0].item() == pytest.approx(0.02)
    affine = QuantizationScheme(8, False, signed=False)
    scale, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(1.55), affine)
    assert (scale.item(), zero_point.item()) == (pytest.approx(0.01), 100)
    # A range beside zero is widened to it.
    scale, zero_point = choose_qparams(torch.tensor(1.0), torch.tensor(2.55), affine)
    assert (scale.item(), zero_point.item()) == (pytest.approx(0.01), 0)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (float("nan"), 1.0, r"from nan to 1 "),
        (0.0, float("nan"), r"from 0 to nan "),
        (0.0, float("inf"), r"from 0 to inf "),
        (float("-inf"), 0.0, r"from -inf to 0 "),
        (2.0, 1.0, r"from 2 to 1 cannot be quantized.*minimum at most the maximum"),
    ],
)
def test_unusable_range_is_refused(low, high, message):
    with pytest.raises(QuantizationError, match=message):
        choose_qparams(torch.tensor(low), torch.tensor(high), QuantizationScheme())
    with pytest.raises(QuantizationError, match=r"of the head from .* in channel 1 cannot"):
        check_range(torch.tensor([0.0, low]), torch.tensor([0.0, high]), where="of the head")


def test_shapes_that_differ_are_refused():
    with pytest.raises(QuantizationError, match=r"\(2,\) and \(3,\)"):
        choose_qparams(torch.zeros(2), torch.ones(3), QuantizationScheme(granularity="channel"))
    assert choose_qparams(-torch.ones(2, 3), torch.ones(2, 3), QuantizationScheme())[0].shape == (
        2,
        3,
    )
    with pytest.raises(QuantizationError, match=r"from 2 to 1 at \[1, 0\] of the scales"):
        choose_qparams(torch.tensor([[0.0], [2.0]]), torch.ones(2, 1), QuantizationScheme())


def test_arguments_are_left_alone_and_get_no_gradient():
    low = torch.tensor(1.0, requires_grad=True)
    high = torch.tensor(2.0)
    scale, zero_point = choose_qparams(low, high, QuantizationScheme(8, False))
    assert (low.item(), high.item()) == (1.0, 2.0)
    assert not scale.requires_grad
    assert not zero_point.requires_grad


def test_training_steps_may_skip_the_check():
    scale, _ = compute_qparams(torch.tensor(float("nan")), torch.tensor(1.0), QuantizationScheme())
    assert scale.isnan()


@given(st.integers(2, 16), st.booleans(), st.integers(0, 2**32 - 1))
def test_real_range_is_that_of_all_integers_and_scales(bits: int, symmetric: bool, seed: int):
    scheme = QuantizationScheme(bits=bits, symmetric=symmetric, granularity="channel")
    generator = torch.Generator().manual_seed(seed)
    low, high = -torch.rand(3, generator=generator), torch.rand(3, generator=generator)
    scale, zero_point = choose_qparams(low, high, scheme)
    parameters = QuantizationParameters(scale, zero_point, scheme.quant_min, scheme.quant_max, 0)
    integers = np.array([scheme.quant_min, scheme.quant_max], dtype=np.float64)[:, None]
    levels = (integers - zero_point.numpy()) * scale.numpy().astype(np.float64)
    assert [limit.item() for limit in parameters.real_range()] == [levels.min(), levels.max()]
