"""Every kind of module computes with the values that its integers stand for."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from compression_manager.quantization import QuantizationScheme, Quantizer
from compression_manager.quantization.fused_paths import disable_fused_paths
from integer_weights import TiedModel, leaves, numpy_read


class OwnModule(nn.Module):
    """Parameters in all places where torch allows them; `matrix` is read twice."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.list = nn.ParameterList([torch.randn(6, 6), torch.randn(6)])
        self.dictionary = nn.ParameterDict({"a": torch.randn(6, 4)})
        self.position = nn.Parameter(torch.randn(1, 3, 6))

    def forward(self, input):
        hidden = (input + self.position) @ self.matrix.t() @ self.matrix + self.list[1]
        return hidden @ self.list[0] @ self.dictionary["a"]


class Conv1D(nn.Module):
    """As in transformers.pytorch_utils: the weight is (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        shape = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


IMAGE = (torch.randn(2, 4, 7, 7),)
SEQUENCE = (torch.randn(2, 3, 6),)
KINDS = {
    "linear": (nn.Linear(6, 5), SEQUENCE),
    "model": (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), SEQUENCE),
    "own": (OwnModule(), SEQUENCE),
    "conv1D": (Conv1D(5, 6), SEQUENCE),
    "bilinear": (nn.Bilinear(6, 6, 2), SEQUENCE * 2),
    "conv1d": (nn.Conv1d(3, 4, 3), SEQUENCE),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2), IMAGE),
    "conv3d": (nn.Conv3d(1, 2, 3), (torch.randn(1, 1, 4, 4, 4),)),
    "channels_last": (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), IMAGE),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2), IMAGE),
    "embedding": (nn.Embedding(9, 6, padding_idx=0), (torch.tensor([[0, 3], [8, 3]]),)),
    "bag": (nn.EmbeddingBag(9, 6, mode="sum"), (torch.tensor([[0, 3], [8, 3]]),)),
    "attention": (nn.MultiheadAttention(6, 2, batch_first=True), SEQUENCE * 3),
    "attention_kdim": (
        nn.MultiheadAttention(6, 2, kdim=4, vdim=2, add_bias_kv=True),
        (torch.randn(3, 2, 6), torch.randn(5, 2, 4), torch.randn(5, 2, 2)),
    ),
    "encoder": (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2, enable_nested_tensor=False
        ),
        SEQUENCE,
    ),
    "lstm": (nn.LSTM(6, 4, 2, bidirectional=True, batch_first=True), SEQUENCE),
    "lstm_projection": (nn.LSTM(6, 4, proj_size=3), SEQUENCE),
    "gru": (nn.GRU(6, 4), SEQUENCE),
    "rnn": (nn.RNN(6, 4, bias=False), SEQUENCE),
    "lstm_cell": (nn.LSTMCell(6, 4), (torch.randn(2, 6),)),
    "weight_norm": (parametrizations.weight_norm(nn.Linear(6, 5)), SEQUENCE),
    "spectral_norm": (parametrizations.spectral_norm(nn.Linear(6, 5)).eval(), SEQUENCE),
    "tied": (TiedModel(), (torch.tensor([0, 3, 11]),)),
}
SCHEMES = [
    QuantizationScheme(symmetric=False),
    QuantizationScheme(granularity="channel"),
    QuantizationScheme(4, granularity="group", group_size=4),
    QuantizationScheme(3, symmetric=False, granularity="channel"),
]


@pytest.fixture(params=KINDS)
def kind(request):
    model, inputs = KINDS[request.param]
    return copy.deepcopy(model).eval(), inputs


def run(model, inputs):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported")
        return leaves(model(*inputs))


def large(model):
    return {name: item for name, item in model.named_parameters() if item.dim() > 1}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_computes_with_what_the_integers_stand_for(kind, scheme):
    model, inputs = kind
    reference = copy.deepcopy(model)
    exact = run(model, inputs)
    assert Quantizer(scheme).quantize_weights(model) is model
    state = model.state_dict()
    for name, parameter in large(reference).items():
        code, scale, zero_point = numpy_read(state, name, tuple(parameter.shape), scheme)
        values = torch.tensor((code - zero_point).astype("float32") * scale, dtype=torch.float32)
        parameter.data = values.to(memory_format=torch.preserve_format)
    expected, found = run(reference, inputs), run(model, inputs)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert not all(torch.equal(a, b) for a, b in zip(exact, found, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_saved_loaded_and_dequantized_it_is_the_same(kind, scheme):
    model, inputs = kind
    fresh, plain = (copy.deepcopy(model) for _ in range(2))
    for parameter in fresh.parameters():
        parameter.data.uniform_()
    quantizer = Quantizer(scheme)
    quantizer.quantize_weights(model)
    state, expected = model.state_dict(), run(model, inputs)
    quantizer.prepare(fresh).load_state_dict(state)
    for name, tensor in fresh.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])
    assert all(map(torch.equal, expected, run(fresh, inputs)))

    assert quantizer.dequantize_weights(fresh) is fresh
    values = dict(fresh.named_parameters())
    assert list(values) == [name for name, _ in plain.named_parameters()]
    assert list(fresh.state_dict()) == list(plain.state_dict())
    assert [type(item) for item in fresh.modules()] == [type(item) for item in plain.modules()]
    assert [set(vars(item)) for item in fresh.modules()] == [
        set(vars(item)) for item in plain.modules()
    ]
    for name, parameter in plain.named_parameters():
        assert type(values[name]) is nn.Parameter
        assert values[name].stride() == parameter.stride()
    for a, b in zip(expected, run(fresh, inputs), strict=True):
        assert torch.equal(a, b)


def test_a_recurrent_layer_keeps_no_floats():
    layer = nn.LSTM(6, 4)
    Quantizer(QuantizationScheme()).quantize_weights(layer)
    run(layer, SEQUENCE)
    assert "_flat_weights" not in vars(layer)
    floats = [item for item in vars(layer).values() if isinstance(item, list)]
    assert not leaves(floats)
    Quantizer(QuantizationScheme()).dequantize_weights(layer)
    assert layer._flat_weights[0] is layer.weight_ih_l0


def test_fused_paths_read_the_integers_too():
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True).eval()
    Quantizer(QuantizationScheme(4, granularity="channel")).quantize_weights(layer)
    fused = run(layer, SEQUENCE)[0]
    disable_fused_paths(layer)
    torch.testing.assert_close(fused, run(layer, SEQUENCE)[0], rtol=1e-5, atol=1e-6)


def test_what_is_no_weight_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 4))
    model[2].register_buffer("table", torch.randn(4, 4))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 4)))
    model.register_parameter("complex", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))
    before = {name: item.clone() for name, item in model.state_dict().items()}
    Quantizer(QuantizationScheme()).quantize_weights(model)
    assert {name for name, _ in model.named_parameters()} == {
        *("empty", "complex", "0.bias", "1.weight", "1.bias", "2.bias"),
    }
    for name, item in model.state_dict().items():
        if not name.startswith(("0.weight", "2.weight")):
            assert torch.equal(item, before[name])


def test_biases_and_norms_still_train():
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1))
    Quantizer(QuantizationScheme()).quantize_weights(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    model(SEQUENCE[0]).square().mean().backward()
    optimizer.step()
    changed = {
        name for name, item in model.state_dict().items() if not torch.equal(item, before[name])
    }
    assert changed == {"0.bias", "1.weight", "1.bias", "2.bias"}
