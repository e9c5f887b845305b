"""LSTM, GRU and RNN against torch's own layers on numpy's weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from compression_manager.quantization import QuantizationScheme
from layer_reference import quantized, quantized_weight

LAYERS = {
    "LSTM": lambda: nn.LSTM(6, 5),
    "deep LSTM": lambda: nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True, bias=False),
    "LSTM with projection": lambda: nn.LSTM(6, 5, 2, proj_size=3),
    "GRU": lambda: nn.GRU(6, 5, 2, bidirectional=True),
    "GRU by batch": lambda: nn.GRU(6, 5, batch_first=True),
    "RNN": lambda: nn.RNN(6, 5, 2, nonlinearity="relu"),
}
INPUTS = {
    "batch": lambda: torch.randn(4, 3, 6),
    "one sequence": lambda: torch.randn(4, 6),
    "packed": lambda: pack_sequence(
        [torch.randn(length, 6) for length in (2, 4, 1)], enforce_sorted=False
    ),
}


def built(name):
    torch.manual_seed(0)
    return LAYERS[name]()


def outputs(layer, input, state=None):
    output, hidden = layer(input, state)
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    return [getattr(output, "data", output), *hidden]


def gradients(layer, results):
    total = torch.stack([result.sin().sum() for result in results]).sum()
    return torch.autograd.grad(total, list(layer.parameters()))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("axis", [0, None])
def test_recurrent_layers_equal_the_reference(name, kind, axis):
    expected_layer, layer = built(name), built(name)
    with torch.no_grad():
        for key, value in expected_layer.named_parameters():
            if key.startswith("weight"):
                value.copy_(quantized_weight(value, axis)[0])
    scheme = QuantizationScheme() if axis is None else QuantizationScheme(granularity="channel")
    quantized(layer, scheme=scheme)
    input = INPUTS[kind]()
    expected, actual = outputs(expected_layer, input), outputs(layer, input)
    torch.testing.assert_close(actual, expected)
    # Twice, as in training, and with the state of the first call.
    state = tuple(actual[1:]) if len(actual) == 3 else actual[1]
    again = outputs(layer, input, state)
    torch.testing.assert_close(again, outputs(expected_layer, input, state))
    # Symmetric weights are never clipped.
    torch.testing.assert_close(
        gradients(layer, actual), gradients(expected_layer, expected), rtol=1e-5, atol=1e-5
    )


def test_dropout_between_layers_draws_as_in_torch():
    torch.manual_seed(0)
    layer = nn.LSTM(6, 5, 2, dropout=0.5)
    input = torch.randn(4, 3, 6)
    torch.manual_seed(1)
    expected, _ = layer(input)
    torch.manual_seed(1)
    actual, _ = quantized(layer, on=False)(input)
    assert torch.equal(actual, expected)


def test_a_call_changes_nothing_that_another_thread_reads(monkeypatch):
    layer = quantized(nn.LSTM(3, 4), weight_only=True)
    before, seen, forward = layer._flat_weights, [], nn.LSTM.forward

    def spy(self, *args):
        seen.append(layer._flat_weights is before and self._flat_weights is not before)
        return forward(self, *args)

    monkeypatch.setattr(nn.LSTM, "forward", spy)
    layer(torch.randn(5, 2, 3))
    assert seen == [True]


def test_the_float_weights_are_back_after_every_call():
    layer = quantized(built("LSTM"))
    weights = layer._flat_weights
    layer(torch.randn(4, 3, 6))
    assert layer._flat_weights is weights
    with pytest.raises(RuntimeError, match=r"input\.size"):
        layer(torch.randn(4, 3, 7))
    assert layer._flat_weights is weights
    assert [id(item) for item in weights] == [id(item) for item in layer.parameters()]


@pytest.mark.parametrize("change", ["copied", "cast", "called with other weights"])
def test_new_weight_tensors_are_quantized_as_well(change):
    layer = quantized(built("LSTM"), scheme=QuantizationScheme(bits=3, granularity="channel"))
    input = torch.randn(4, 3, 6)
    exact = built("LSTM")(input)[0]
    expected = layer(input)[0]
    assert (expected - exact).abs().max() > 1e-3
    if change == "copied":
        actual = copy.deepcopy(layer)(input)[0]
    elif change == "cast":
        actual = layer.double()(input.double())[0].float()
    else:
        others = {key: value.detach().clone() for key, value in layer.named_parameters()}
        actual = torch.func.functional_call(layer, others, (input,))[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
