"""The warning about clipped logits."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from compression_plugins import QuantizedTeacher
from quantized_teachers import levels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def logits_with(clipped, count=200):
    """Logits that fit the default scale of 8 bits, but for the first `clipped`."""
    logits = torch.rand(count // 4, 4) - 0.5
    logits.view(-1)[:clipped] = 3.0
    return logits


def suggestion(text):
    """The arguments that a warning suggests."""
    found = re.search(r"scale=([\d.e+-]+)(?:, zero_point=(-?\d+))? would hold them", text)
    zero_point = {} if found[2] is None else {"zero_point": int(found[2])}
    return {"scale": float(found[1]), **zero_point}


def test_more_than_one_percent_causes_one_warning_per_object():
    first, second = QuantizedTeacher(nn.Identity()), QuantizedTeacher(nn.Identity())
    first(logits_with(2))
    with pytest.warns(UserWarning, match=r"clipped 1\.5% of the 200 logits of a batch") as seen:
        first(logits_with(3))
    assert len(seen) == 1
    assert "between -0.49" in str(seen[0].message)
    first(logits_with(200))
    with pytest.warns(UserWarning, match=r"clipped 100\.0% of the 200 logits"):
        second(logits_with(200))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_logit_that_rounds_into_the_range_is_not_clipped(sign):
    logits = torch.full((1, 4), sign * 127.49 / 128)
    QuantizedTeacher(nn.Identity())(logits)
    with pytest.warns(UserWarning, match=r"clipped 100\.0%"):
        QuantizedTeacher(nn.Identity())(logits + sign * 0.02 / 128)


def test_the_limit_is_exact_in_the_precision_of_the_arithmetic():
    QuantizedTeacher(nn.Identity())(torch.tensor([[127.5 - 1e-9]], dtype=torch.float64) / 128)
    with pytest.warns(UserWarning, match=r"clipped 100\.0%"):
        QuantizedTeacher(nn.Identity(), 32)(torch.ones(1, 4))


def test_an_affine_range_is_looked_at_from_its_zero_point():
    options = {"symmetric": False, "scale": 1.0, "zero_point": -128}
    QuantizedTeacher(nn.Identity(), **options)(torch.tensor([[0.0, 255.4]]))
    with pytest.warns(UserWarning, match=r"clipped 50\.0%"):
        QuantizedTeacher(nn.Identity(), **options)(torch.tensor([[-0.6, 255.4]]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 20, 24, 25, 31, 32])
def test_the_suggested_scale_holds_every_logit(bits, symmetric):
    for seed in range(20):
        torch.manual_seed(seed)
        logits = torch.randn(1, 3) * 10 + 10
        if bits == 1 and symmetric:
            logits = logits.abs()
        with pytest.warns(UserWarning, match="would hold them") as seen:
            QuantizedTeacher(nn.Identity(), bits, symmetric=symmetric)(logits)
        fitting = suggestion(str(seen[0].message))
        output = QuantizedTeacher(nn.Identity(), bits, symmetric=symmetric, **fitting)(logits)
        assert (output - logits).abs().max() <= fitting["scale"] * 0.51 + 1e-5


def test_the_suggested_scale_is_no_wider_than_needed():
    logits = torch.tensor([[-12.7, 5.0]])
    with pytest.warns(UserWarning, match="clipped") as seen:
        QuantizedTeacher(nn.Identity())(logits)
    high = levels(8, True)[1]
    assert suggestion(str(seen[0].message))["scale"] == pytest.approx(12.7 / high, rel=1e-6)


def test_one_symmetric_bit_cannot_hold_negative_logits():
    with pytest.warns(UserWarning, match="leaves no negative level; use symmetric=False"):
        QuantizedTeacher(nn.Identity(), 1)(torch.tensor([[-5.0, 1.0]]))


def test_infinite_logits_are_clipped_by_every_range():
    logits = torch.tensor([[1.0, -torch.inf]])
    with pytest.warns(UserWarning, match=r"between 0 and 1; .* infinite logits, which no range"):
        QuantizedTeacher(nn.Identity(), scale=0.1)(logits)


def test_nan_and_empty_batches_are_not_clipped():
    teacher = QuantizedTeacher(nn.Identity())
    teacher(torch.full((2, 4), torch.nan))
    teacher(torch.zeros(0, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_looked_at(dtype):
    with pytest.warns(UserWarning, match=r"clipped 1\.5% of the 200"):
        QuantizedTeacher(nn.Identity())(logits_with(3).to(dtype))


def test_dynamic_ranges_clip_nothing():
    QuantizedTeacher(nn.Identity(), dynamic=True)(100 * torch.randn(50, 4))


def test_looking_changes_no_result_and_no_gradient():
    logits = (3 * torch.randn(50, 4)).requires_grad_()
    teacher = QuantizedTeacher(nn.Identity())
    with pytest.warns(UserWarning, match="clipped"):
        first = teacher(logits)
    assert torch.equal(teacher(logits), first)
    first.sum().backward()
    assert torch.equal(logits.grad, torch.ones_like(logits))


def test_graphs_do_not_look_and_do_not_use_the_warning_up():
    torch.compiler.reset()
    teacher, inputs = QuantizedTeacher(nn.Identity()), logits_with(100)
    compiled = torch.compile(teacher, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(inputs)
        for strict in (True, False):
            torch.export.export(teacher, (inputs,), strict=strict).module()(inputs)
        teacher.export_graph(inputs).module()(inputs)
        teacher(inputs.to("meta"))
    copied = copy.deepcopy(teacher)
    for each in (teacher, copied):
        with pytest.warns(UserWarning, match="clipped"):
            each(inputs)
