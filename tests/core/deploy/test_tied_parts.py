"""Parameters that several layers share, modules used more than once, wrapped and frozen layers."""

import pytest
import safetensors.torch
import torch
from torch import nn

from compression_manager import deploy
from compression_manager.deploy import ConvertedLayer
from compression_manager.quantization.layers import QuantizedLayer
from quantization_reference import trained
from toy_transformers import Conv1D


class SharedAttention(nn.Module):
    """Two attentions with one input projection, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2)
        self.second = nn.MultiheadAttention(8, 2)
        self.second.in_proj_weight = self.first.in_proj_weight

    def forward(self, input):
        for layer in (self.first, self.second, self.second):
            input = input + layer(input, input, input)[0]
        return input


class SharedLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(6, 6)
        self.second = nn.LSTM(6, 6)
        self.second.weight_hh_l0 = self.first.weight_hh_l0

    def forward(self, input):
        return self.second(self.first(input)[0])[0]


class Language(nn.Module):
    """An embedding bag and a table tied to the head."""

    def __init__(self):
        super().__init__()
        self.bags = nn.EmbeddingBag(12, 6, mode="sum")
        self.table = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.table.weight = self.bags.weight
        self.head.weight = self.bags.weight

    def forward(self, indices):
        return self.head(self.table(indices) + self.bags(indices)[:, None])


INDICES = torch.randint(12, (3, 4), generator=torch.Generator().manual_seed(0))
INPUT = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
MODELS = {
    "attention": (
        SharedAttention, INPUT, [(f"first.{part}", f"second.{part}")
        for part in ("query", "key", "value")],
    ),
    "LSTM": (SharedLSTM, INPUT[..., :6], [("first.hh_l0", "second.hh_l0")]),
    "tables": (Language, INDICES, [("bags", "table"), ("bags", "head")]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_shared_weights_share_their_integers(name, tmp_path):
    build, input, pairs = MODELS[name]
    torch.manual_seed(0)
    model = build()
    manager = trained(model, input)
    assert sum("integers shared with" in row.detail for row in manager.report().layers) == len(
        {second.partition(".")[0] for _, second in pairs}
    )
    after = manager.report().bytes_after
    converted = manager.convert()
    manager.save_converted(tmp_path / "int8")
    stored = safetensors.torch.load_file(tmp_path / "int8" / "model.safetensors")
    assert sum(value.numel() * value.element_size() for value in stored.values()) == after
    loaded = deploy.load(tmp_path / "int8", build())
    for candidate in (converted, loaded):
        for first, second in pairs:
            one, other = (candidate.get_submodule(key) for key in (first, second))
            assert one.integer_weight() is other.integer_weight()
            assert one.weight_scale is other.weight_scale
        shared = {second for _, second in pairs}
        own = {
            id(module.integer_weight())
            for key, module in candidate.named_modules()
            if isinstance(module, ConvertedLayer)
            and key not in shared
            and hasattr(module, "weight")
        }
        assert len(own) == sum(value.dtype == torch.int8 for value in stored.values())
    assert torch.equal(loaded(input), converted(input))
    model.eval()
    torch.testing.assert_close(converted(input), model(input), rtol=1e-4, atol=1e-5)


class Adapter(nn.Module):
    """A layer inside of another that calls it, as low-rank adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(8, 2, bias=False)

    def forward(self, input):
        return self.base(input) + self.down(input).sum(-1, keepdim=True)


@pytest.mark.parametrize("build", [lambda: Conv1D(6, 8), lambda: nn.Linear(8, 6)])
def test_a_wrapped_frozen_layer_is_quantized_inside_of_its_wrapper(build):
    torch.manual_seed(0)
    model = Adapter(build())
    model.base.requires_grad_(False)
    before = model.base.weight.clone()
    manager = trained(model, INPUT)
    assert isinstance(model.base, QuantizedLayer)
    assert torch.equal(model.base.weight, before)
    converted = manager.convert()
    assert converted.base.integer_weight().dtype == torch.int8
    assert max(manager._conversion.parity.layer_errors.values()) <= 1e-6
    manager.close()
    assert not any(parameter.requires_grad for parameter in model.base.parameters())
