"""What the Quantizer leaves out, refuses and reports; nothing is ever half-changed."""

import copy

import pytest
import torch
from torch import nn

from compression_manager.errors import ConfigError, QuantizationError
from compression_manager.quantization import (
    HistogramCalibration,
    MinMaxCalibration,
    QuantizationScheme,
    Quantizer,
    StorageReport,
)
from compression_manager.quantization.layers import quantize_layer
from compression_manager.quantization.quantizers.quantizer_module import ObservedFakeQuantizer
from compression_manager.quantization.site import QuantizationSite
from integer_weights import TiedModel

INT8 = QuantizationScheme()


def network():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), nn.LayerNorm(2)
    )


def integer_names(model):
    return {name for name, item in model.state_dict().items() if item.dtype == torch.int8}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), {"0.weight", "1.0.weight", "1.1.weight"}),
        (("0",), {"1.0.weight", "1.1.weight"}),
        (("1",), {"0.weight"}),
        (("1.*",), {"0.weight"}),
        (["1.1.weight", "0"], {"1.0.weight"}),
        (("*.1",), {"0.weight", "1.0.weight"}),
        (("2",), {"0.weight", "1.0.weight", "1.1.weight"}),
    ],
)
def test_skip(skip, left):
    model = network()
    quantizer = Quantizer(INT8, skip=skip)
    quantizer.quantize_weights(model)
    assert integer_names(model) == left
    fresh = quantizer.prepare(network())
    fresh.load_state_dict(model.state_dict())
    assert integer_names(fresh) == left


@pytest.mark.parametrize("name", ["embedding", "head", "head.weight"])
def test_a_tied_weight_is_skipped_by_any_of_its_names(name):
    model = Quantizer(INT8, skip=(name,)).quantize_weights(TiedModel())
    assert model.head.weight is model.embedding.weight
    assert integer_names(model) == {"middle.weight"}


def test_a_layer_used_twice_has_both_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(4, 4)})
    with pytest.raises(QuantizationError, match=r"nothing to quantize.*skipped by 'second'"):
        Quantizer(INT8, skip=("second", "other")).quantize_weights(model)
    Quantizer(INT8, skip=("other",)).quantize_weights(model)
    assert torch.equal(model["first"].weight, model["second"].weight)
    Quantizer(INT8).dequantize_weights(model)
    assert model["first"] is model["second"]


def test_skip_that_matches_nothing_names_the_nearest():
    model = TiedModel()
    with pytest.raises(ConfigError, match=r"Quantizer.skip: 'midle' matches no .*'middle'"):
        Quantizer(INT8, skip=("midle",)).quantize_weights(model)
    assert type(model.head) is nn.Linear


def parameter_ids(model):
    return [(name, id(item)) for name, item in model.named_parameters(remove_duplicate=False)]


def refused(quantizer, model, match, error=QuantizationError):
    before, kinds = parameter_ids(model), [type(item) for item in model.modules()]
    state = {name: item.clone() for name, item in model.state_dict().items()}
    with pytest.raises(error, match=match):
        quantizer.quantize_weights(model)
    assert parameter_ids(model) == before
    assert [type(item) for item in model.modules()] == kinds
    assert list(model.state_dict()) == list(state)
    for name, item in model.state_dict().items():
        torch.testing.assert_close(item, state[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("calibration", [MinMaxCalibration(), HistogramCalibration()])
def test_weights_that_are_not_finite(value, calibration):
    model = network()
    with torch.no_grad():
        model[1][0].weight[1, 3] = value
    refused(Quantizer(INT8, calibration), model, rf"weight '1.0.weight' holds {value} at \[1, 3\]")
    Quantizer(INT8, calibration, skip=("1.0",)).quantize_weights(model)


def test_an_axis_that_a_weight_lacks():
    scheme = QuantizationScheme(granularity="channel", axis=2)
    refused(
        Quantizer(scheme),
        network(),
        r"weight '1.0.weight': axis 2 does not exist .*\(4, 4\).*skip=\('1.0.weight',\)",
    )
    assert integer_names(Quantizer(scheme, skip=("1",)).quantize_weights(network())) == {"0.weight"}


def test_quantizing_twice():
    model = Quantizer(INT8, skip=("1",)).quantize_weights(network())
    for call in (Quantizer(INT8).quantize_weights, Quantizer(INT8).prepare):
        with pytest.raises(QuantizationError, match="layer '0' holds integer weights already"):
            call(model)


def test_a_model_in_training_with_fake_quantizers():
    layer = nn.Linear(3, 3)
    site = QuantizationSite("", "weight")
    observer = MinMaxCalibration().make_observer(INT8, site)
    quantize_layer(layer, ObservedFakeQuantizer(INT8, site, observer), None)
    refused(Quantizer(INT8), nn.Sequential(layer), "layer '0' is prepared for quantization-aware")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_has_fixed_code():
    scripted = torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(QuantizationError, match="layer '1' is a TorchScript module"):
        Quantizer(QuantizationScheme()).quantize_weights(nn.Sequential(nn.ReLU(), scripted))


def test_nothing_to_quantize():
    refused(Quantizer(INT8), nn.BatchNorm1d(3), "nothing to quantize.*weight: .*two dimensions")
    refused(Quantizer(INT8), nn.ReLU(), "it has no parameters")


def test_nothing_to_dequantize():
    with pytest.raises(QuantizationError, match="holds no integer weights"):
        Quantizer(INT8).dequantize_weights(network())


def test_lazy_and_meta_weights_have_no_values():
    refused_lazy = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3))
    with pytest.raises(QuantizationError, match=r"weight '1.weight' is not initialised yet"):
        Quantizer(INT8).quantize_weights(refused_lazy)
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(QuantizationError, match=r"'weight' is on the meta device.*prepare"):
        Quantizer(INT8).quantize_weights(model)


@pytest.mark.parametrize("suffix", ["_scale", "_zero_point", "_scheme"])
def test_an_attribute_in_the_way(suffix):
    model = network()
    model[1][1].register_buffer(f"weight{suffix}", torch.ones(1))
    refused(
        Quantizer(QuantizationScheme(symmetric=False)),
        model,
        f"weight '1.1.weight': its module has an attribute 'weight{suffix}' already",
    )


class Final(nn.Module):
    """A class that refuses to be derived from."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def __init_subclass__(cls):
        raise TypeError("Final is final")


def test_a_change_that_fails_midway_is_undone():
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3), Final(), nn.Linear(3, 3))
    model.append(nn.Linear(3, 3))
    model[4].weight = model[0].weight
    lists = model[1]._flat_weights
    refused(Quantizer(INT8), model, "weight '2.weight': a Final cannot hold .*Final is final.*skip")
    assert all(map(torch.equal, model[1]._flat_weights, lists))
    assert model[1]._flat_weights[0] is model[1].weight_ih_l0


def test_dynamic_schemes_are_for_activations():
    with pytest.raises(QuantizationError, match="leave out dynamic=True"):
        Quantizer(QuantizationScheme(dynamic=True))
    with pytest.raises(QuantizationError, match="leave out dynamic=True"):
        Quantizer(QuantizationScheme(granularity="token", dynamic=True))


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((8,), {}, "scheme must be of type QuantizationScheme"),
        ((INT8, "min_max"), {}, "calibration must be of type Calibration"),
        ((INT8,), {"skip": "head"}, "skip must be a list"),
        ((INT8,), {"skip": (3,)}, "skip must be a list"),
    ],
)
def test_arguments_of_other_types(arguments, options, match):
    with pytest.raises(ConfigError, match=match):
        Quantizer(*arguments, **options)


@pytest.mark.parametrize("method", ["quantize_weights", "prepare", "dequantize_weights", "report"])
def test_what_is_no_module(method):
    with pytest.raises(ConfigError, match="must be of type Module"):
        getattr(Quantizer(INT8), method)({"weight": torch.ones(2, 2)})


def test_calibrations_that_do_not_fit_say_where():
    refused(
        Quantizer(INT8, HistogramCalibration(objective="kl_divergence")),
        network(),
        "layer '0'.*'kl_divergence' is for activations",
    )


def test_a_stored_weight_cannot_be_assigned_to():
    model = Quantizer(INT8).quantize_weights(TiedModel())
    for module in (model.middle, model.head):
        with pytest.raises(QuantizationError, match="'weight' of this Linear is stored as integ"):
            module.weight = nn.Parameter(torch.ones(8, 8))
    assert "weight" in model.middle._buffers
    model.middle.bias = nn.Parameter(torch.ones(8))


def test_requires_grad_and_the_order_of_parameters_return():
    model = network()
    model[0].weight.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    quantizer = Quantizer(INT8)
    quantizer.dequantize_weights(quantizer.quantize_weights(model))
    assert [name for name, _ in model.named_parameters()] == names
    assert [item.requires_grad for item in model[0].parameters()] == [False, True]
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(torch.optim.Adam(network().parameters()).state_dict())
    assert model[1][0].weight.is_leaf


def test_hooks_and_isinstance_survive():
    model, calls = network(), []
    model[1][0].register_forward_hook(lambda *_: calls.append(1))
    Quantizer(INT8).quantize_weights(model)
    model[1](torch.randn(1, 4))
    assert calls == [1]
    assert isinstance(model[1][0], nn.Linear)
    assert str(model[1][0]) == (
        "Linear(in_features=4, out_features=4, bias=True, weight=int8 symmetric per tensor)"
    )


def test_report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10, bias=False), nn.LayerNorm(10))
    exact = model[0].weight.detach().double()
    quantizer = Quantizer(QuantizationScheme(4, granularity="channel"), skip=("1",))
    before = quantizer.report(model)
    assert before.bytes_before == before.bytes_after == 4 * (600 + 20 + 200 + 10 + 10)
    quantizer.quantize_weights(model)
    report = quantizer.report(model)
    assert isinstance(report, StorageReport)
    stored, *others = report.weights
    assert (stored.name, stored.detail) == ("0.weight", "int4 symmetric per channel (axis 0)")
    # Integers, scales, and the note on the scheme.
    assert (stored.bytes_before, stored.bytes_after) == (2400, 300 + 20 * 4 + 8 * 4)
    noise = (model[0].weight - exact).square().sum()
    expected = 10 * torch.log10(exact.square().sum() / noise)
    assert stored.sqnr_db == pytest.approx(expected.item(), rel=1e-6)
    assert {item.name: item.detail for item in others} == {
        "0.bias": "it has fewer than two dimensions",
        "1.weight": "skipped by '1'",
        "2.weight": "it has fewer than two dimensions",
        "2.bias": "it has fewer than two dimensions",
    }
    assert report.bytes_before == before.bytes_before
    assert report.bytes_after == before.bytes_before - 2400 + 412
    lines = str(report).splitlines()
    assert lines[1].split()[:4] == ["0.weight", "2,400", "412", f"{expected:.1f}"]
    assert lines[-1].split() == ["total", "3,360", "1,372"]
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert quantizer.report(model).weights[0].sqnr_db is None


def test_report_of_what_is_exact():
    model = nn.Linear(2, 2, bias=False)
    nn.init.ones_(model.weight)
    quantizer = Quantizer(INT8)
    assert "inf" in str(quantizer.report(quantizer.quantize_weights(model)))
