"""Bias correction: the numbers, against numpy in float64, and what it gains."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import ConfigError, prepare_compression
from compression_manager.quantization import QuantizationScheme
from compression_plugins import PTQConfig
from quantization_reference import fake_quantized, weight_grid

VECTORS = toys.vectors().tensors[0]
BATCHES = list(VECTORS.split(8))
THREE_BITS = QuantizationScheme(bits=3, granularity="channel", axis=0)


def corrected(model, data=BATCHES, **options):
    """A manager after weight-only PTQ with bias correction."""
    options = {"mode": "weight_only", "weight": THREE_BITS, **options}
    return prepare_compression(
        model, [PTQConfig(calibration_data=data, bias_correction=True, **options)]
    )


def arrays(layer):
    weight = layer.weight.detach().numpy()
    quantized, _ = fake_quantized(weight, weight_grid(weight, bits=3), axis=0)
    return (
        weight.astype(np.float64),
        quantized.astype(np.float64),
        layer.bias.detach().clone().numpy(),
    )


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [20, 9, 3]])
def test_each_layer_keeps_its_mean_output_one_after_the_other(sizes):
    torch.manual_seed(0)
    model = toys.mlp()
    inputs = VECTORS.double().numpy()
    (w1, q1, b1), (w2, q2, b2) = arrays(model[0]), arrays(model[2])
    new1 = b1 - (inputs @ q1.T - inputs @ w1.T).mean(0)
    hidden = np.maximum(inputs @ w1.T + b1, 0)
    approximate = np.maximum(inputs @ q1.T + new1, 0)
    new2 = b2 - (approximate @ q2.T - hidden @ w2.T).mean(0)

    corrected(model, list(VECTORS.split(sizes)))
    assert np.abs(new1 - b1).max() > 0.01
    np.testing.assert_allclose(model[0].bias.detach().numpy(), new1, atol=1e-6)
    np.testing.assert_allclose(model[2].bias.detach().numpy(), new2, atol=1e-6)


def test_mean_outputs_are_those_of_the_float_model_with_quantized_inputs_too():
    torch.manual_seed(0)
    model = toys.mlp()
    wanted = model(VECTORS).mean(0)
    float_model = copy.deepcopy(model)
    three = QuantizationScheme(bits=3, symmetric=False, signed=False)
    prepare_compression(
        float_model,
        [PTQConfig(weight=THREE_BITS, activation=three, calibration_data=BATCHES)],
    )
    corrected(model, mode="static", activation=three)
    assert (float_model.eval()(VECTORS).mean(0) - wanted).abs().max() > 0.02
    torch.testing.assert_close(model.eval()(VECTORS).mean(0), wanted, rtol=1e-5, atol=1e-6)


class Branches(nn.Module):
    """Convolutions before a BatchNorm: with a bias, without one, and one used elsewhere too."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 4, 3, bias=False)
        self.bn3 = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 3)
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, input):
        hidden = self.bn1(self.conv1(input)).relu()
        hidden = self.bn2(self.conv2(hidden)).relu()
        hidden = self.conv3(hidden)
        hidden = self.bn3(hidden) + hidden
        return self.head(self.up(hidden).mean((2, 3)))


IMAGES = toys.images().tensors[0] + 0.5


def branches():
    torch.manual_seed(1)
    model = Branches()
    for module in (model.bn1, model.bn2, model.bn3):
        module.running_mean.normal_()
        module.running_var.uniform_(0.2, 2)
        with torch.no_grad():
            module.weight.copy_(torch.tensor([1.0, -0.5, 0.0, 2.0]))
    return model.eval()


def channel_means(model, *names):
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.__setitem__(
                name, output.double().mean((0, 2, 3))
            )
        )
        for name in names
    ]
    with torch.no_grad():
        model.eval()(IMAGES)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("examples", [None, IMAGES[:2]])
def test_conv_batch_norm_pairs_are_corrected_where_folding_puts_the_bias(examples, capsys):
    model = branches()
    before = copy.deepcopy(model)
    wanted = channel_means(before, "bn1", "bn2", "up")
    data = {"calibration_data": IMAGES.split(8), "bias_correction": True}
    manager = prepare_compression(
        model, [PTQConfig("weight_only", THREE_BITS, **data)], example_inputs=examples
    )
    # Sums of float32 in another order move means that are near zero.
    for name, mean in channel_means(model, "bn1", "bn2", "up").items():
        torch.testing.assert_close(mean, wanted[name], rtol=1e-5, atol=2e-6)
    for name in ("weight", "bias"):
        for norm in ("bn1", "bn2", "bn3"):
            assert torch.equal(
                model.get_submodule(norm).get_parameter(name),
                before.get_submodule(norm).get_parameter(name),
            )
    assert not torch.equal(model.bn1.running_mean, before.bn1.running_mean)
    assert torch.equal(model.bn2.running_mean, before.bn2.running_mean)
    assert torch.equal(model.bn3.running_mean, before.bn3.running_mean)
    assert (
        "biases not corrected: 'conv3': it has no bias; 'head': it has no bias"
        in capsys.readouterr().err
    )
    converted = manager.convert()
    assert isinstance(converted.bn1, nn.Identity)
    assert max(manager.report().parity.layer_errors.values()) <= 1e-6
    means = channel_means(converted, "conv1", "conv2", "up")
    torch.testing.assert_close(means["conv1"], wanted["bn1"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(means["conv2"], wanted["bn2"], rtol=1e-5, atol=2e-6)


def test_what_a_hook_of_the_user_does_to_an_output_is_not_corrected():
    torch.manual_seed(0)
    model = toys.mlp()
    hooked = copy.deepcopy(model)
    hooked[2].register_forward_hook(lambda module, args, output: output * 10.0)
    corrected(model)
    corrected(hooked)
    assert torch.equal(hooked[2].bias, model[2].bias)


def test_closing_restores_the_biases_bit_for_bit():
    model = branches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    manager = corrected(model, IMAGES.split(8))
    assert not torch.equal(model.up.bias, before["up.bias"])
    manager.close()
    toys.assert_identical(dict(model.state_dict()), before)


def test_closing_after_training_takes_only_the_correction_back():
    torch.manual_seed(0)
    model = toys.mlp()
    bias = model[2].bias.detach().clone()
    manager = corrected(model)
    with torch.no_grad():
        model[2].bias.add_(1.0)
    manager.close()
    torch.testing.assert_close(model[2].bias.detach(), bias + 1.0)


def test_the_model_still_takes_a_float_state_dict():
    torch.manual_seed(0)
    state = toys.mlp().state_dict()
    model = toys.mlp()
    corrected(model)
    model.load_state_dict(state)
    assert torch.equal(model[0].bias, state["0.bias"])


def test_a_shared_bias_is_corrected_once(capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].bias = model[0].bias
    wanted = F.linear(VECTORS, model[0].weight, model[0].bias).mean(0)
    corrected(model)
    torch.testing.assert_close(model[0](VECTORS).mean(0), wanted, rtol=1e-5, atol=1e-6)
    assert "'2': it shares its bias with '0'" in capsys.readouterr().err


def test_attention_is_corrected_at_its_output_alone(capsys):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    tokens = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model)
    corrected(model, [tokens])
    assert "'self_attn': a MultiheadAttention has no output" in capsys.readouterr().err
    assert torch.equal(model.self_attn.in_proj_bias, before.self_attn.in_proj_bias)
    for name in ("self_attn.out_proj.bias", "linear1.bias", "linear2.bias"):
        assert not torch.equal(model.get_parameter(name), before.get_parameter(name))


@pytest.mark.parametrize("batch", [torch.full((3, 6), float("nan")), torch.zeros(0, 6)])
def test_batches_without_finite_values_do_not_reach_the_biases(batch):
    torch.manual_seed(0)
    model, same = toys.mlp(), toys.mlp()
    same.load_state_dict(model.state_dict())
    corrected(model, [*BATCHES, batch])
    corrected(same)
    assert torch.equal(model[0].bias, same[0].bias)
    assert torch.equal(model[2].bias, same[2].bias)


@pytest.mark.parametrize("batch", [torch.full((3, 6), float("nan")), torch.zeros(0, 6)])
def test_data_without_finite_values_is_refused(batch):
    model = toys.mlp()
    bias = model[0].bias.detach().clone()
    with pytest.raises(ConfigError, match="'0': no batch gave it a finite output"):
        corrected(model, [batch])
    assert torch.equal(model[0].bias, bias)


def test_a_layer_that_no_batch_reaches_keeps_its_bias(capsys):
    model = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)})
    model.forward = lambda input: model["used"](input)
    bias = model["unused"].bias.detach().clone()
    corrected(model)
    assert torch.equal(model["unused"].bias, bias)
    assert "'unused': no batch gave it a finite output" in capsys.readouterr().err


def test_a_model_without_biases_is_refused():
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    with pytest.raises(
        ConfigError, match=r"finds no bias to correct: '0': it has no bias"
    ) as error:
        corrected(model)
    assert error.value.option == "bias_correction"


def test_shuffled_data_is_the_same_in_every_pass():
    class Shuffled:
        walks = 0

        def __iter__(self):
            Shuffled.walks += 1
            return iter([VECTORS[torch.randperm(32)[:8]] for _ in range(3)])

    corrected(toys.mlp(), Shuffled())
    assert Shuffled.walks == 1


def test_it_lowers_the_error_of_a_trained_network():
    torch.manual_seed(0)
    model = toys.ConvNet(8)
    inputs, targets = toys.images(256).tensors
    inputs = inputs + 0.4 * targets.reshape(-1, 1, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        wanted = model.eval()(inputs)
    assert (wanted.argmax(1) == targets).float().mean() > 0.9

    errors = {}
    for correction in (False, True):
        data = {"calibration_data": inputs[:128].split(32)} if correction else {}
        manager = prepare_compression(
            copy.deepcopy(model),
            [PTQConfig("weight_only", THREE_BITS, bias_correction=correction, **data)],
        )
        with torch.no_grad():
            # On images that were not calibrated on.
            difference = manager.convert(inputs[:8])(inputs[128:]) - wanted[128:]
        errors[correction] = float(difference.square().mean())
    assert errors[True] < 0.8 * errors[False]
