"""The hash by which a checkpoint knows its teacher."""

import copy
import warnings

import pytest
import torch
from torch import nn

import toys
from compression_plugins.distillation.teachers.teacher import weights_hash


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Tensors(nn.Module):
    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, value)


def digest(**values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return weights_hash(Tensors(**values))


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).reshape(2, 3).to(torch.bfloat16),
        torch.arange(6.0).reshape(2, 3).half(),
        torch.arange(6.0).reshape(2, 3).to(torch.float8_e4m3fn),
        torch.tensor(3.0),
        torch.tensor(True),
        torch.zeros(0),
        torch.zeros(2, 0, 3, dtype=torch.bfloat16),
        torch.arange(6).reshape(2, 3).T,
        torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(3, dtype=torch.complex64),
        torch.tensor(0.0).expand(3),
    ],
    ids=lambda value: f"{value.dtype}-{tuple(value.shape)}",
)
def test_hash_takes_every_dtype_shape_and_layout(value):
    assert digest(a=value) == digest(a=value.clone().contiguous())
    assert digest(a=value) != digest(b=value)
    assert digest(a=value) != digest(a=value.reshape(1, *value.shape))


def test_hash_tells_values_dtypes_and_names_apart():
    base = torch.zeros(2, 3)
    changed = base.clone()
    changed[1, 2] = -0.0
    values = [base, changed, base.int(), base.bool(), base.to(torch.bfloat16), base.half()]
    assert len({digest(a=value) for value in values}) == len(values)
    assert digest(a=base, b=changed) != digest(a=changed, b=base)


def test_hash_does_not_depend_on_the_mode_or_on_gradients():
    model = toys.ConvNet()
    before = weights_hash(model)
    assert weights_hash(model.eval().requires_grad_(False)) == before
    assert weights_hash(copy.deepcopy(model)) == before
    with torch.no_grad():
        model.bn1.running_mean[0] += 1
    assert weights_hash(model) != before
