"""The report: what became of every layer, in bytes and decibels."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import prepare_compression
from compression_manager.errors import ConfigError
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.layers.decisions import LayerArithmetic
from compression_manager.report import LayerReport, Report
from compression_plugins.fake_quant import LayerRule, QATConfig
from quantization_reference import (
    activation_grid,
    averaged_range,
    fake_quantized,
    prepared,
    trained,
    weight_grid,
)

IMAGES = toys.images().tensors[0]
VECTORS = toys.vectors().tensors[0]


class Everything(nn.Module):
    """Layers of all kinds, tied and skipped ones, buffers that are saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(4, 6))
        self.embedding = nn.Embedding(10, 6)
        self.attention = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm1d(6)
        self.plain = nn.Linear(6, 6, bias=False)
        self.skipped = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 3)
        self.head = nn.Linear(6, 10)
        self.head.weight = self.embedding.weight
        self.register_buffer("kept", torch.ones(5))
        self.register_buffer("scratch", torch.ones(1000), persistent=False)

    def forward(self, input):
        hidden = self.attention(self.embedding(input) + self.position)
        hidden = F.relu(self.bn(self.conv(hidden.transpose(1, 2)))).transpose(1, 2)
        return self.head(self.skipped(self.plain(hidden)))


INDICES = torch.randint(10, (8, 4), generator=torch.Generator().manual_seed(0))
SKIP = (LayerRule("skipped", skip=True),)


def saved_bytes(model):
    """Bytes of the distinct tensors in the state_dict."""
    tensors = {value.data_ptr(): value for value in model.state_dict().values()}
    return sum(value.numel() * value.element_size() for value in tensors.values())


SCHEMES = [
    QATConfig().weight,
    QuantizationScheme(),
    QuantizationScheme(bits=16, granularity="channel"),
    QuantizationScheme(bits=32, symmetric=False),
    QuantizationScheme(bits=4, granularity="channel", axis=1),
]


@pytest.mark.parametrize("weight", SCHEMES, ids=str)
def test_bytes_are_those_of_the_saved_tensors(weight, tmp_path):
    torch.manual_seed(0)
    model = Everything()
    before = saved_bytes(model)
    manager = trained(model, INDICES, weight=weight, overrides=SKIP)
    report = manager.report()
    assert report.bytes_before == before
    converted = manager.convert()
    assert manager.report().bytes_after == report.bytes_after == saved_bytes(converted)
    rows = {layer.name: layer for layer in report.layers}
    sizes = dict.fromkeys(rows, 0)
    for name, module in converted.named_modules():
        own = [*module.parameters(recurse=False)]
        own += [b for n, b in module.named_buffers(recurse=False) if n in module.state_dict()]
        # The parts of attention count for it.
        row = name if name in rows else name.rpartition(".")[0]
        if own and name not in ("head", "bn"):
            sizes[row] += sum(t.numel() * t.element_size() for t in own)
    for name, size in sizes.items():
        if name not in ("head", "bn"):
            assert rows[name].bytes_after == size
    assert "integers shared with 'embedding'" in rows["head"].detail
    manager.save_converted(tmp_path / "int8")
    header = 8 + 200 * len(converted.state_dict())
    size = (tmp_path / "int8" / "model.safetensors").stat().st_size
    assert report.bytes_after <= size <= report.bytes_after + header


def test_bytes_of_bfloat16_layers():
    model = toys.ConvNet().bfloat16()
    before = saved_bytes(model)
    manager = trained(model, IMAGES.bfloat16())
    report = manager.report()
    assert (report.bytes_before, report.bytes_after) == (before, saved_bytes(manager.convert()))


def test_every_layer_is_listed_with_what_became_of_it():
    manager = trained(Everything(), INDICES, overrides=SKIP)
    rows = {layer.name: layer for layer in manager.report().layers}
    quantized = {"embedding", "conv", "plain", "unused", "head"}
    quantized |= {f"attention.linear{i}" for i in (1, 2)}
    quantized |= {"attention.self_attn", "attention.self_attn.out_proj"}
    assert {name for name, row in rows.items() if row.quantized} == quantized
    assert rows["plain"].detail == (
        "weight int8 symmetric per channel (axis 0), input uint8 affine per tensor"
    )
    assert rows["embedding"].detail == "weight int8 symmetric per channel (axis 0), input float"
    assert rows["plain"].kind == "Linear"
    reasons = {
        "": "Everything has no quantized form",
        "bn": "folded into 'conv' at conversion",
        "skipped": "skipped by LayerRule(layer='skipped')",
        "attention.norm1": "LayerNorm has no quantized form",
    }
    for name, reason in reasons.items():
        assert rows[name].detail == reason
    assert rows["bn"].bytes_after == 0


def test_noise_is_that_of_an_independent_computation():
    torch.manual_seed(0)
    model = toys.mlp()
    manager = prepared(model, [VECTORS, VECTORS])
    report = manager.report(VECTORS)
    grids = {}
    hidden = model[1](model[0](VECTORS)).detach()  # in training mode: observed once more
    assert hidden.shape == (32, 8)
    model.eval()
    for name, input in (("0", VECTORS), ("2", None)):
        layer = model.get_submodule(name)
        if input is None:
            input = model[1](model[0](VECTORS)).detach()
        scale = np.float32(layer.input_quantizer.scale)
        grids[name] = (scale, np.float32(layer.input_quantizer.zero_point), 0, 255)
        weight, bias = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
        rounded = fake_quantized(weight.astype(np.float32), weight_grid(np.float32(weight)), 0)[0]
        values = input.numpy()
        noisy = fake_quantized(values, grids[name])[0].astype(np.float64)
        exact = values.astype(np.float64) @ weight.T + bias
        actual = noisy @ rounded.astype(np.float64).T + bias
        expected = 10 * np.log10((exact**2).sum() / ((exact - actual) ** 2).sum())
        found = {row.name: row.sqnr_db for row in report.layers}[name]
        assert 20 < found < 70
        assert found == pytest.approx(expected, abs=0.02)
    first = activation_grid(*averaged_range([VECTORS, VECTORS]))
    assert grids["0"][0] == pytest.approx(first[0], rel=1e-5)


def test_all_calls_of_a_layer_count():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, input):
            self.linear(input * 0)  # on zeros, the output is exact: the bias
            return self.linear(input=input)

    torch.manual_seed(0)
    model = Twice()
    manager = prepared(model, [VECTORS] * 2)
    both = manager.report().layers[0].sqnr_db
    layer = model.eval().linear
    with torch.no_grad():
        exact = [F.linear(x, layer.weight, layer.bias).double() for x in (VECTORS * 0, VECTORS)]
        actual = [layer(x) for x in (VECTORS * 0, VECTORS)]
    signal = sum(float(e.square().sum()) for e in exact)
    noise = sum(float((e - a).square().sum()) for e, a in zip(exact, actual, strict=True))
    assert both == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)


def test_noise_is_unknown_where_nothing_is_quantized_yet_or_ever():
    manager = prepare_compression(Everything(), [QATConfig(overrides=SKIP)])
    assert all(row.sqnr_db is None for row in manager.report().layers)
    assert all(row.sqnr_db is None for row in manager.report(INDICES).layers)
    manager.close()
    rows = {row.name: row for row in trained(Everything(), INDICES).report().layers}
    assert rows["unused"].sqnr_db is None
    assert rows["attention.norm1"].sqnr_db is None
    assert rows["plain"].sqnr_db is not None


def test_measuring_changes_nothing():
    model = toys.ConvNet(dropout=0.5)
    manager = trained(model, IMAGES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    random = torch.get_rng_state()
    manager.report(10 * IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())


def test_a_wrong_example_is_explained():
    manager = trained(toys.mlp(), VECTORS)
    with pytest.raises(ConfigError, match="cannot be called with the example inputs"):
        manager.report(IMAGES)
    with pytest.raises(ConfigError, match=r"of a pair \(inputs, targets\) pass the inputs"):
        manager.report((VECTORS, VECTORS))
    assert not manager.model[0]._forward_hooks


def test_a_lazy_layer_is_reported_before_its_first_forward_pass():
    model = nn.Sequential(nn.Linear(6, 4), nn.LazyLinear(3))
    manager = prepare_compression(model, [QATConfig()])
    row = manager.report().layers[1]
    assert (row.kind, row.bytes_before, row.detail) == (
        "LazyLinear", 0, "it is lazy: run one forward pass before preparing",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "plain"), [(math.inf, "inf"), (-math.inf, "-inf"), (41.5, 41.5), (None, None)]
)
def test_the_report_is_valid_json(value, plain):
    arithmetic = LayerArithmetic("a", "b", ["c"], "d")
    row = LayerReport("fc", "Linear", True, "int8", 40, 10, value, arithmetic)
    document = json.loads(json.dumps(Report((row,)).to_dict(), allow_nan=False))
    assert document == {
        "layers": [
            {
                "name": "fc", "kind": "Linear", "quantized": True, "detail": "int8",
                "bytes_before": 40, "bytes_after": 10, "sqnr_db": plain,
                "arithmetic": {
                    "training": "a", "evaluation": "b", "reasons": ["c"], "kernel": "d",
                },
                "time_ratio": None,
            }
        ],
        "bytes_before": 40,
        "bytes_after": 10,
        "parity": None,
        "sensitivity": None,
        "graph": None,
        "notes": {},
    }  # fmt: skip


def test_a_layer_without_noise_has_infinite_quality():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, -1.0], [0.0, 1.27]]))
        layer.bias.zero_()
    inputs = torch.zeros(1, 2)
    manager = prepared(layer, [inputs] * 2)
    assert manager.report().layers[0].sqnr_db == math.inf
    assert json.dumps(manager.report().to_dict(), allow_nan=False)


def test_printing_shows_an_aligned_table():
    rows = (
        LayerReport("conv1", "Conv2d", True, "weight int8", 1440, 92, 41.87),
        LayerReport("", "Linear", False, "skipped", 100, 100, None),
        LayerReport("fc", "Linear", True, "weight int8", 4, 1, math.inf),
    )
    assert str(Report(rows)).splitlines() == [
        "layer        kind    bytes  after  output SQNR dB  quantized how, or why not",
        "conv1        Conv2d  1,440     92            41.9  weight int8",
        "(the model)  Linear    100    100               -  skipped",
        "fc           Linear      4      1             inf  weight int8",
        "total                1,544    193",
    ]


def test_report_tells_the_parity_of_the_last_conversion() -> None:
    model = toys.ConvNet()
    manager = prepare_compression(model, [QATConfig()])
    toys.train(
        manager, toys.loader(toys.images()), torch.optim.SGD(model.parameters(), lr=0.1), epochs=1
    )
    assert manager.report().parity is None
    assert "parity" not in str(manager.report())
    manager.convert()
    report = manager.report()
    assert report.parity is not None
    assert set(report.parity.layer_errors) == {"conv1", "conv2", "fc"}
    assert str(report).splitlines()[-1].startswith("parity of the converted model")
    assert report.to_dict()["parity"]["output_error"] == report.parity.output_error
    manager.close()


def test_a_layer_that_came_after_preparing_is_told_from_one_without_a_weight():
    model = toys.mlp()
    manager = prepare_compression(model, [QATConfig()])
    model.append(nn.Linear(4, 2))
    model.append(nn.LayerNorm(2))
    details = {layer.name: layer.detail for layer in manager.report().layers}
    assert "the layer came after the model was prepared" in details["3"]
    assert details["4"] == "not a layer with a weight"
