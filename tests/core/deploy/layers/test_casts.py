"""A converted model that is cast keeps its grid, and returns the model's dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization import QuantizationScheme
from quantization_reference import trained

DTYPES = [torch.bfloat16, torch.float16, torch.float64]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(16, 4)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.words(indices)
        logits: Tensor = self.head(self.attention(hidden, hidden, hidden)[0])
        return logits


MODELS = {
    "linear": (lambda: nn.Linear(16, 4), randn(3, 16)),
    "convolution": (lambda: nn.Conv2d(16, 8, 3), randn(2, 16, 6, 6)),
    "embedding": (lambda: nn.Embedding(9, 16), torch.tensor([[1, 2, 8]])),
    "words": (Words, torch.tensor([[1, 2, 8], [0, 3, 5]])),
}
every_model = pytest.mark.parametrize("name", MODELS)


def cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    return input.to(dtype) if input.is_floating_point() else input


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_model
@torch.no_grad()
def test_a_cast_model_computes_what_the_cast_trained_one_does(
    name: str, dtype: torch.dtype
) -> None:
    build, input = MODELS[name]
    torch.manual_seed(0)
    with torch.enable_grad():
        manager = trained(build(), input)
    converted = manager.convert().to(dtype)
    model = manager.model.to(dtype).eval()
    output, expected = converted(cast(input, dtype)), model(cast(input, dtype))
    assert output.dtype == expected.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_model
def test_casting_forth_and_back_changes_no_scale(name: str, dtype: torch.dtype) -> None:
    build, input = MODELS[name]
    torch.manual_seed(0)
    converted = trained(build(), input).convert()
    before = copy.deepcopy(converted.state_dict())
    after = converted.to(dtype).to(torch.float32).state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        if value.is_floating_point() and not key.endswith("_scale"):
            value = value.to(dtype).float()
        assert torch.equal(value, after[key]), key


@every_model
def test_parameters_are_cast_as_those_of_the_float_layer(name: str) -> None:
    build, input = MODELS[name]
    torch.manual_seed(0)
    converted = trained(build(), input).convert().bfloat16()
    for key, value in converted.state_dict().items():
        if value.is_floating_point():
            expected = torch.float32 if key.endswith("_scale") else torch.bfloat16
            assert value.dtype == expected, key


def test_the_weight_follows_casts() -> None:
    torch.manual_seed(0)
    scheme = QuantizationScheme(4, granularity="channel")
    converted = trained(nn.Linear(16, 4), randn(3, 16), weight=scheme).convert()
    before = converted.weight.clone()
    assert converted.bfloat16().weight.dtype == torch.bfloat16
    assert torch.equal(converted.float().weight, before)
