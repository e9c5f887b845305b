"""Every kind of layer, from training to a loaded deployment."""

import copy

import pytest
import torch
from torch import nn

from compression_manager import deploy
from compression_manager.deploy.layers.base import ConvertedLayer
from compression_manager.deploy.layers.kinds import CONVERTED_CLASSES
from compression_manager.errors import CheckpointMismatchError
from compression_manager.models.calling import tensors_in
from compression_manager.quantization import (
    QuantizableAdd,
    QuantizableAttention,
    QuantizableMatmul,
    QuantizationScheme,
)
from compression_manager.quantization.layers import QuantizedLayer
from quantization_reference import trained
from toy_transformers import Conv1D


class Products(nn.Module):
    """A matrix product and attention of activations, through the modules made for it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.matmul = QuantizableMatmul()
        self.attention = QuantizableAttention()

    def forward(self, input):
        hidden = self.embed(input)
        scores = self.matmul(hidden, right=hidden.transpose(-2, -1))
        heads = hidden.unflatten(-1, (2, 4)).transpose(1, 2)
        return scores, self.attention(heads, heads, heads + 1, is_causal=True, scale=0.3)


class Residual(nn.Module):
    """A block whose input is added to its output, and one that is added to all samples."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.add = QuantizableAdd()
        self.shift = QuantizableAdd()

    def forward(self, input):
        hidden = input.relu()
        return self.shift(self.add(self.embed(hidden), residual=hidden), input[:1].sin())


class Bags(nn.Module):
    def __init__(self, mode, **options):
        super().__init__()
        self.bags = nn.EmbeddingBag(12, 6, mode=mode, **options)

    def forward(self, indices, offsets=None, factors=None):
        return self.bags(indices, offsets, factors)


class Upsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)

    def forward(self, images):
        return self.up(images, output_size=(8, 7))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, query, key, value, **arguments):
        return self.attention(query, key, value, **arguments)


class Sequences(nn.Module):
    """An LSTM over packed sequences; asks it to lay out its weights, as many models do."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, proj_size=3, batch_first=True)

    def forward(self, batch, lengths):
        self.lstm.flatten_parameters()
        packed = nn.utils.rnn.pack_padded_sequence(batch, lengths, True, enforce_sorted=False)
        output, hidden = self.lstm(packed)
        return nn.utils.rnn.pad_packed_sequence(output, batch_first=True)[0], hidden


def decoder_block():
    return nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def encoder_block():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def indices(*shape):
    return torch.randint(12, shape, generator=torch.Generator().manual_seed(0))


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True], [True] + [False] * 4])
MODELS = {
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 5, 3, stride=2), (randn(2, 3, 6),)),
    "transposed 2d": (Upsample, (randn(2, 4, 4, 4),)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), (randn(2, 2, 3, 3, 3),)),
    "transposed and BatchNorm": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.ConvTranspose2d(6, 2, 3, stride=2), nn.BatchNorm2d(2),
        ),
        (randn(8, 4, 5, 5),),
    ),
    "bags of sums": (lambda: Bags("sum"), (indices(9), torch.tensor([0, 3, 3]), randn(9))),
    "bags of means": (lambda: Bags("mean", padding_idx=3), (indices(4, 5),)),
    "bags of maxima": (
        lambda: Bags("max", include_last_offset=True), (indices(9), torch.tensor([0, 3, 9]))
    ),
    "Conv1D": (lambda: nn.Sequential(Conv1D(8, 6), nn.GELU(), Conv1D(4, 8)), (randn(2, 3, 6),)),
    "attention": (
        Attention,
        {"query": randn(4, 3, 8), "key": randn(5, 3, 8), "value": randn(5, 3, 8) + 1,
         "key_padding_mask": PADDING, "average_attn_weights": False},
    ),
    "attention of three widths": (
        lambda: Attention(
            kdim=6, vdim=4, batch_first=True, bias=False, add_bias_kv=True, add_zero_attn=True
        ),
        {"query": randn(3, 4, 8), "key": randn(3, 5, 6), "value": randn(3, 5, 4),
         "need_weights": False},
    ),
    "LSTM": (lambda: nn.LSTM(6, 5, 2, bidirectional=True, dropout=0.5), (randn(7, 3, 6),)),
    "LSTM with projection": (Sequences, (randn(3, 7, 6), torch.tensor([4, 7, 2]))),
    "GRU": (
        lambda: nn.GRU(6, 5, 2, bias=False, batch_first=True), (randn(3, 7, 6), randn(2, 3, 5))
    ),
    "RNN": (lambda: nn.RNN(6, 5, nonlinearity="relu"), (randn(7, 6),)),
    "products": (Products, (randn(2, 5, 6),)),
    "residual": (Residual, (randn(2, 5, 6),)),
    "encoder block": (encoder_block, (randn(5, 3, 8),)),
    "decoder block": (decoder_block, (randn(3, 4, 8), randn(3, 5, 8))),
}  # fmt: skip
SCHEMES = {
    "int8 per channel": QuantizationScheme(granularity="channel"),
    "int4 in groups": QuantizationScheme(bits=4, granularity="group", group_size=4),
    "uint8 per tensor": QuantizationScheme(symmetric=False, signed=False),
}


def as_arguments(inputs):
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


def call(model, inputs):
    arguments, keywords = as_arguments(inputs)
    with torch.no_grad():
        return list(tensors_in(model(*arguments, **keywords)))


def quantized_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_trained_converted_saved_and_loaded(name, scheme, tmp_path):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build()
    classes = {key: type(module) for key, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    start = copy.deepcopy(model.state_dict())
    manager = trained(model, inputs, weight=SCHEMES[scheme])
    layers = quantized_layers(model)
    assert len(layers) == sum(kind.__name__ in CONVERTED_CLASSES for kind in classes.values())

    converted = manager.convert()
    errors = manager._conversion.parity.layer_errors
    assert set(errors) == layers
    assert max(errors.values()) <= 1e-6
    model.eval()
    for expected, actual in zip(call(model, inputs), call(converted, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    rows = {row.name: row for row in manager.report(inputs).layers}
    assert {key for key, row in rows.items() if row.quantized} == layers
    assert all(rows[key].sqnr_db > 5 for key in layers)

    manager.save_converted(tmp_path / "int8")
    torch.manual_seed(1)
    loaded = deploy.load(tmp_path / "int8", build())
    state = loaded.state_dict()
    assert list(state) == list(converted.state_dict())
    for key, value in converted.state_dict().items():
        assert value.dtype == state[key].dtype
        assert torch.equal(value, state[key])
    for expected, actual in zip(call(converted, inputs), call(loaded, inputs), strict=True):
        assert torch.equal(expected, actual)
    for module in loaded.modules():
        if isinstance(module, ConvertedLayer):
            assert not list(module.parameters(recurse=False))

    manager.close()
    assert {key: type(module) for key, module in model.named_modules()} == classes
    assert list(model.state_dict()) == list(start)
    after = dict(model.named_parameters())
    assert all(after[key] is value for key, value in parameters.items())
    assert any(not torch.equal(start[key], value) for key, value in model.state_dict().items())


def test_the_integers_of_a_transposed_convolution_are_output_channels_first(tmp_path):
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(4, 6, 3, groups=2)
    converted = trained(model, randn(2, 4, 5, 5)).convert()
    integers = converted.integer_weight()
    assert integers.shape == (6, 2, 3, 3)
    assert converted.weight_scale.shape == (6,)
    assert integers.dtype == torch.int8
    # Of group 1 of 2: output channel 4 is the second of three, inputs 2 and 3.
    own = model.weight[2:, 1].detach()
    torch.testing.assert_close(converted.weight_scale[4], own.abs().max() / 127)
    expected = (own / own.abs().max() * 127).round().to(torch.int8)
    assert torch.equal(integers[4], expected)


def test_batch_norm_behind_a_transposed_convolution_is_folded():
    build, inputs = MODELS["transposed and BatchNorm"]
    torch.manual_seed(0)
    model = build()
    manager = trained(model, inputs[0])
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, 0.3]))
        model[1].bias.normal_()
    converted = manager.convert()
    assert [type(converted[index]) for index in (1, 4)] == [nn.Identity, nn.Identity]
    # Signs follow gamma, channel by channel.
    plain = model[0].weight.detach().unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
    signs = torch.tensor([1, -1, 0, 1, -1, 1]).reshape(-1, 1, 1, 1)
    assert torch.equal(converted[0].integer_weight().sign(), (plain.sign() * signs).to(torch.int8))


def test_a_loaded_bag_reads_other_calls_as_well():
    torch.manual_seed(0)
    model = Bags("sum", padding_idx=3)
    converted = trained(model, indices(4, 5)).convert()
    table = converted.bags.float_weight(torch.float32)
    for arguments in [
        (indices(0), torch.tensor([0, 0])),
        (torch.full((2, 3), 3),),
        (indices(7).int(), torch.tensor([0, 7], dtype=torch.int32), randn(7)),
    ]:
        expected = nn.functional.embedding_bag(
            arguments[0], table, *arguments[1:2], mode="sum", padding_idx=3,
            per_sample_weights=arguments[2] if len(arguments) == 3 else None,
        )  # fmt: skip
        torch.testing.assert_close(converted(*arguments), expected)


def test_loading_into_a_model_with_another_kind_of_layer_leaves_it_unchanged(tmp_path):
    build, inputs = MODELS["encoder block"]
    trained(build(), inputs[0]).save_converted(tmp_path / "int8")
    other = nn.TransformerEncoderLayer(8, 2, 20, dropout=0.0).train()
    classes = [type(module) for module in other.modules()]
    children = list(other.self_attn.children())
    with pytest.raises(CheckpointMismatchError, match=r"tensor 'linear1\.\w+' is"):
        deploy.load(tmp_path / "int8", other)
    assert [type(module) for module in other.modules()] == classes
    assert list(other.self_attn.children()) == children
    assert all(module.training for module in other.modules())


def test_another_kind_of_supported_layer_is_refused(tmp_path):
    trained(nn.GRU(6, 5), randn(7, 3, 6)).save_converted(tmp_path / "int8")
    with pytest.raises(CheckpointMismatchError, match="layer '' was a GRU; here it is a LSTM"):
        deploy.load(tmp_path / "int8", nn.LSTM(6, 5))
