"""Noise in the output from one layer alone, against numpy; table, JSON, chart and metrics."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError, prepare_compression
from compression_manager.quantization import QuantizationScheme
from compression_plugins import LayerRule, LearnedScaleConfig, QATConfig
from probes import probe

FOUR_BITS = QuantizationScheme(4, granularity="channel")


def trained(*others, rules=(), activation=None, model=None):
    model = toys.mlp() if model is None else model
    config = QATConfig(overrides=rules, activation=activation)
    manager = prepare_compression(model, [config, *others])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    manager.track(optimizer=optimizer)
    toys.train(manager, toys.loader(toys.vectors()), optimizer, epochs=1)
    return manager


def log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_equals_numpy_with_one_layer_quantized():
    torch.manual_seed(0)
    manager = trained(rules=(LayerRule(layer="2", weight=FOUR_BITS),))
    inputs = torch.randn(16, 6)
    first, second = manager.model[0], manager.model[2]
    weights = [layer.weight.detach().double().numpy() for layer in (first, second)]
    biases = [layer.bias.detach().double().numpy() for layer in (first, second)]

    def output(bits):
        hidden = inputs.double().numpy()
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if bits[index] is not None:
                scale = np.abs(weight).max(1, keepdims=True) / (2 ** (bits[index] - 1) - 1)
                weight = np.rint(weight / scale) * scale
            hidden = hidden @ weight.T + bias
            hidden = np.maximum(hidden, 0) if index == 0 else hidden
        return hidden

    exact = output((None, None))
    measured = {layer.name: layer for layer in manager.sensitivity(inputs).layers}
    for name, bits in {"0": (8, None), "2": (None, 4)}.items():
        noisy = output(bits)
        sqnr = 10 * np.log10((exact**2).sum() / ((exact - noisy) ** 2).sum())
        log_p, log_q = log_softmax(exact), log_softmax(noisy)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
        assert measured[name].output_sqnr_db == pytest.approx(sqnr, abs=0.05)
        assert measured[name].output_kl == pytest.approx(kl, rel=0.05)
    assert [layer.name for layer in manager.sensitivity(inputs).layers] == ["2", "0"]
    manager.close()


def test_nothing_is_left_changed():
    manager = trained(activation=QuantizationScheme(8, False, signed=False))
    manager.model.train()
    inputs = torch.randn(4, 6)
    before = {name: value.clone() for name, value in manager.model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    manager.sensitivity(inputs)
    assert manager.model.training
    assert torch.equal(torch.random.get_rng_state(), random_state)
    after = manager.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    phases = [quantizer.phase for quantizer in manager.model[0].quantizers()]
    assert all(phase.quantizing for phase in phases)
    manager.close()


def test_report_table_json_graph_and_chart(tmp_path):
    manager = trained()
    report = manager.report(torch.randn(4, 6), sensitivity=True)
    assert manager.report(torch.randn(4, 6)).sensitivity is None
    listed = manager.report(torch.randn(4, 6), graph=True)
    assert str(listed).endswith(str(listed.graph))
    assert listed.to_dict()["graph"] == str(manager.graph(torch.randn(4, 6))).splitlines()
    assert "output SQNR dB" in str(report)
    rows = json.loads(json.dumps(report.to_dict()))["sensitivity"]["layers"]
    assert [row["name"] for row in rows] == [x.name for x in report.sensitivity.layers]
    chart = report.sensitivity.save_chart(tmp_path / "chart.svg")
    texts = [element.text for element in ElementTree.parse(chart).iter() if element.text]
    assert {"0", "2"} <= set(texts)
    with pytest.raises(ConfigError, match=r"name it \*\.svg"):
        report.sensitivity.save_chart(tmp_path / "chart.png")
    with pytest.raises(ConfigError, match=r"save_chart cannot write .*missing.*folder that exists"):
        report.sensitivity.save_chart(tmp_path / "missing" / "chart.svg")
    manager.close()


def test_consumers_see_it():
    seen = []
    consumer = probe("consumer", consume_metrics=lambda self, metrics: seen.extend(metrics))
    manager = trained(consumer)
    seen.clear()
    measured = manager.sensitivity(torch.randn(4, 6))
    values = {metric.name: metric.as_float() for metric in seen}
    for layer in measured.layers:
        prefix = f"sensitivity/{layer.name}"
        assert values[f"{prefix}/output_sqnr_db"] == pytest.approx(layer.output_sqnr_db)
        assert values[f"{prefix}/output_kl"] == pytest.approx(layer.output_kl)
    manager.close()


def test_a_layer_without_noise_and_outputs_that_are_no_logits():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1, bias=False), nn.Flatten(0))
    manager = prepare_compression(model, [QATConfig(activation=None)])
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    manager.on_train_begin()
    manager.on_step_begin(0)
    manager.on_after_compute_loss(None, None, torch.zeros((), requires_grad=True))
    manager.on_before_optimizer_step()
    manager.on_step_end()
    layers = {layer.name: layer for layer in manager.sensitivity(torch.randn(4, 6)).layers}
    assert math.isinf(layers["1"].output_sqnr_db)
    assert layers["1"].output_kl is None
    assert manager.sensitivity(torch.randn(4, 6)).to_dict()["layers"][-1]["output_sqnr_db"] == "inf"
    manager.close()


def test_refused_without_a_batch_or_a_range():
    manager = prepare_compression(toys.mlp(), [probe()])
    with pytest.raises(ConfigError, match="needs an input"):
        manager.sensitivity()
    with pytest.raises(ConfigError, match="no layer of the model is quantized"):
        manager.sensitivity(torch.randn(2, 6))


def test_gradients_of_learned_scales_survive():
    """Accumulated over several batches, they are still to come to the optimizer."""
    manager = trained(LearnedScaleConfig(), activation=QATConfig().activation)
    output = manager.model(torch.randn(8, 6))
    output.square().mean().backward()
    before = {name: value.grad.clone() for name, value in manager.model.named_parameters()}
    manager.sensitivity(torch.randn(8, 6))
    for name, value in manager.model.named_parameters():
        assert value.requires_grad, name
        assert torch.equal(value.grad, before[name]), name


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        (torch.full((2, 6), math.nan), "NaN or infinity"),
        (torch.empty(0, 6), "no floating-point value"),
    ],
)
def test_refused_where_there_is_nothing_to_compare(inputs, problem):
    manager = prepare_compression(toys.mlp(), [QATConfig(activation=None)])
    with pytest.raises(ConfigError, match=f"returns {problem}; pass a batch"):
        manager.sensitivity(inputs)
    manager.close()


def test_of_a_layer_whose_output_overflows():
    manager = trained()

    def overflow(layer, inputs, output):
        return output * math.inf if layer.weight_quantizer.phase.quantizing else output

    manager.model[2].register_forward_hook(overflow)
    result = manager.sensitivity(torch.randn(4, 6))
    worst = result.layers[0]
    assert (worst.name, worst.output_sqnr_db) == ("2", -math.inf)
    assert result.to_dict()["layers"][0]["output_sqnr_db"] == "-inf"
    assert [result._noise_share(layer) for layer in result.layers] == [1.0, 1.0]
    manager.close()
