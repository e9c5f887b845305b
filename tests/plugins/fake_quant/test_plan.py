"""Which layers are quantized, how, and why the others are not."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as OutputProjection
from torch.nn.utils import parametrizations, parametrize, prune

from compression_manager import prepare_compression
from compression_manager.errors import ConfigError
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.layers import QuantizedLayer, QuantizedLinear
from compression_plugins.fake_quant import LayerRule, QATConfig
from compression_plugins.fake_quant.plan import plan_model
from quantization_reference import prepared

INT4 = QuantizationScheme(bits=4, granularity="channel")
UINT4 = QuantizationScheme(bits=4, symmetric=False, signed=False)


class OwnLinear(nn.Linear):
    pass


class OwnAttention(nn.MultiheadAttention):
    pass


def network():
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(10, 8),
            "encoder": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU()),
            "head": nn.Linear(8, 2),
        }
    )


def plan(model, *rules, **options):
    """Layer -> (weight bits, activation bits or None), and the reasons for the others."""
    manager = prepared(model, overrides=rules, **options)
    chosen = {
        name: (
            module.weight_scheme.bits,
            None if module.input_scheme is None else module.input_scheme.bits,
        )
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    }
    reasons = {layer.name: layer.detail for layer in manager.report().layers if not layer.quantized}
    manager.close()
    return chosen, reasons


def refusal(model, *rules, **options):
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError) as caught:
        prepare_compression(model, [QATConfig(overrides=rules, **options)])
    assert [type(module) for module in model.modules()] == classes
    return str(caught.value)


def test_every_supported_layer_is_quantized_and_embeddings_weight_only():
    chosen, reasons = plan(network())
    assert chosen == {
        "embedding": (8, None), "encoder.0": (8, 8), "encoder.2": (8, 8), "head": (8, 8),
    }  # fmt: skip
    assert reasons == {"encoder.1": "LayerNorm has no quantized form"}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LayerRule("head", weight=INT4), {"head": (4, 8)}),
        (LayerRule("encoder.*", activation=UINT4), {"encoder.0": (8, 4), "encoder.2": (8, 4)}),
        (LayerRule("encoder.[2]", weight_only=True), {"encoder.2": (8, None)}),
        (LayerRule(module_class="Embedding", weight=INT4), {"embedding": (4, None)}),
        (
            LayerRule(module_class="Linear", weight=INT4, weight_only=True),
            {"encoder.0": (4, None), "encoder.2": (4, None), "head": (4, None)},
        ),
    ],
)
def test_a_rule_changes_what_it_matches_and_nothing_else(rule, expected):
    default, _ = plan(network())
    assert plan(network(), rule)[0] == {**default, **expected}


def test_the_last_rule_that_matches_applies_alone():
    chosen, reasons = plan(
        network(),
        LayerRule("*", weight=INT4),
        LayerRule("encoder.*", skip=True),
        LayerRule("encoder.2", weight_only=True),
    )
    assert chosen == {"embedding": (4, None), "encoder.2": (8, None), "head": (4, 8)}
    assert reasons["encoder.0"] == "skipped by LayerRule(layer='encoder.*')"


def test_weights_alone():
    assert set(plan(network(), activation=None)[0].values()) == {(8, None)}
    chosen, _ = plan(network(), LayerRule("head", activation=UINT4), activation=None)
    assert chosen["head"] == (8, 4)


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (LayerRule("haed", skip=True), ["LayerRule(layer='haed') matches no layer", "'head'"]),
        (LayerRule("decoder.*", skip=True), ["matches no layer", "encoder.0"]),
        (LayerRule(module_class="Linaer", skip=True), ["module_class='Linaer'", "'Linear'"]),
        (
            LayerRule("encoder", skip=True),
            ["'encoder' is a container", "LayerRule(layer='encoder.*')"],
        ),
        (
            LayerRule(module_class="Sequential", skip=True),
            ["'encoder' is a container", "LayerRule(layer='encoder.*')"],
        ),
        (LayerRule("encoder.3", skip=True), ["matches no layer", "encoder.2"]),
        (
            LayerRule("encoder.1", weight=INT4),
            ["only layers that cannot be quantized", "encoder.1: LayerNorm has no quantized form"],
        ),
    ],
)
def test_a_rule_without_effect_is_refused(rule, parts):
    message = refusal(network(), rule)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("rule", ["first", "head.0", "head.[0]"])
def test_a_shared_layer_goes_by_each_of_its_names(rule):
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "last": nn.Linear(6, 6)})
    model["head"] = nn.Sequential(model["first"])
    plan = plan_model(model, QATConfig(overrides=[LayerRule(rule, skip=True)]))
    assert [layer.name for layer in plan.layers] == ["last"]
    assert set(plan.skipped) == {"first"}


def test_skipping_a_layer_that_is_not_quantized_anyway_is_allowed():
    _, reasons = plan(network(), LayerRule(module_class="LayerNorm", skip=True))
    assert reasons["encoder.1"] == "skipped by LayerRule(module_class='LayerNorm')"


def test_a_model_in_which_nothing_can_be_quantized_is_refused_with_the_reasons():
    message = refusal(nn.Sequential(nn.LayerNorm(3), OwnLinear(3, 2)))
    assert "would quantize nothing" in message
    assert "0: LayerNorm has no quantized form" in message
    assert "1: OwnLinear is a subclass of Linear with its own behaviour" in message
    assert "Supported layers: Linear, Conv1d, Conv2d, Conv3d, Embedding" in message
    assert "the model has no layers" in refusal(nn.Sequential(nn.ReLU()))
    assert "skipped by" in refusal(nn.Sequential(nn.Linear(2, 2)), LayerRule("*", skip=True))


def test_a_prepared_model_is_refused_until_it_is_closed():
    model = network()
    manager = prepared(model)
    assert "'embedding' is quantization-aware already" in refusal(model)
    manager.close()
    prepared(model).close()


def test_an_axis_that_the_weight_lacks_is_refused():
    scheme = QuantizationScheme(granularity="channel", axis=2)
    message = refusal(network(), LayerRule("head", weight=scheme))
    assert "layer 'head': axis 2" in message
    assert "axes 0 to 1" in message


def weight_norm_linear():
    return parametrizations.weight_norm(nn.Linear(4, 4))


def old_spectral_norm_linear():
    return nn.utils.spectral_norm(nn.Linear(4, 4))


def weight_norm_lstm():
    return nn.utils.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")


def pruned_linear():
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


def patched_linear():
    layer = nn.Linear(4, 4)
    layer.forward = functools.partial(nn.Linear.forward, layer)
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: OwnLinear(4, 4), "OwnLinear is a subclass of Linear"),
        (weight_norm_linear, "its weight is parametrized"),
        (old_spectral_norm_linear, "its weight is computed by a hook"),
        (pruned_linear, "its weight is computed by a hook"),
        (lambda: nn.LazyLinear(4), "it is lazy"),
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "its weight is torch.complex64"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm changes its weight"),
        (lambda: nn.Embedding(4, 4, sparse=True), "no sparse gradient"),
        (lambda: nn.EmbeddingBag(4, 4, max_norm=1.0), "EmbeddingBag with max_norm changes"),
        (lambda: nn.EmbeddingBag(4, 4, sparse=True), "EmbeddingBag with sparse=True has no"),
        (weight_norm_lstm, "its weight is computed by a hook"),
        (lambda: nn.LSTMCell(4, 4), "LSTMCell has no quantized form"),
        (lambda: nn.Bilinear(4, 4, 4), "Bilinear has no quantized form"),
        (lambda: OwnAttention(4, 2), "OwnAttention is a subclass of MultiheadAttention"),
        (patched_linear, "it has a forward of its own, set as an attribute"),
        (lambda: OutputProjection(4, 4), "MultiheadAttention uses its weight without calling it"),
    ],
)
def test_what_is_not_quantized_is_reported_with_the_reason(build, reason):
    layer = build()
    kind = type(layer)
    chosen, reasons = plan(nn.ModuleDict({"odd": layer, "plain": nn.Linear(4, 4)}))
    assert list(chosen) == ["plain"]
    assert type(layer) is kind
    assert reason in reasons["odd"]


def test_attention_and_its_output_projection_are_quantized():
    chosen, reasons = plan(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert list(chosen) == ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    assert set(reasons) == {"norm1", "norm2"}


def test_each_of_attention_s_layers_can_have_a_scheme_of_its_own():
    model = nn.TransformerDecoderLayer(8, 2, 16)
    chosen, _ = plan(
        model,
        LayerRule("self_attn", weight=INT4),
        LayerRule("multihead_attn.out_proj", weight_only=True),
    )
    assert chosen["self_attn"] == (4, 8)
    assert chosen["self_attn.out_proj"] == (8, 8)
    assert chosen["multihead_attn.out_proj"] == (8, None)


@pytest.mark.parametrize(
    "rule", [LayerRule("self_attn", skip=True), LayerRule("*attn*", skip=True)]
)
def test_skipped_attention_keeps_its_output_projection_in_float(rule):
    chosen, reasons = plan(nn.TransformerEncoderLayer(8, 2, 16), rule)
    assert list(chosen) == ["linear1", "linear2"]
    assert reasons["self_attn"] == f"skipped by {rule}"
    assert reasons["self_attn.out_proj"] in (
        f"skipped by {rule}",
        "MultiheadAttention uses its weight without calling it",
    )


def test_attention_alone_is_a_model():
    chosen, _ = plan(nn.MultiheadAttention(8, 2))
    assert list(chosen) == ["", "out_proj"]


def test_attention_of_a_subclass_keeps_its_output_projection_in_float():
    _, reasons = plan(nn.ModuleDict({"odd": OwnAttention(8, 2), "plain": nn.Linear(4, 4)}))
    assert "without calling it" in reasons["odd.out_proj"]


def test_recurrent_layers_and_bags_are_weight_only():
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "bags": nn.EmbeddingBag(4, 4)})
    chosen, _ = plan(model, LayerRule("lstm", weight=INT4))
    assert chosen == {"lstm": (4, None), "bags": (8, None)}


def test_frozen_layers_are_quantized_and_stay_frozen():
    model = network()
    model["encoder"].requires_grad_(False)
    chosen, _ = plan(model)
    assert "encoder.0" in chosen
    assert not any(parameter.requires_grad for parameter in model["encoder"].parameters())


def test_a_parametrization_of_the_bias_alone_counts_as_well():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    _, reasons = plan(nn.ModuleDict({"odd": layer, "plain": nn.Linear(4, 4)}))
    assert "parametrized" in reasons["odd"]


def test_the_model_may_be_one_layer():
    model = nn.Linear(4, 2)
    chosen, _ = plan(model)
    assert list(chosen) == [""]
    manager = prepared(model)
    assert manager.model is model
    assert type(model) is QuantizedLinear
