"""Learned scales in a training: who answers, what is learned, resumed, converted and undone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resuming
import toys
from compression_manager import ConfigError, LifecycleError, StartAt, prepare_compression
from compression_manager.quantization import (
    DynamicFakeQuantizer,
    FakeQuantizer,
    ObservedFakeQuantizer,
    QuantizationScheme,
    quantize,
)
from compression_manager.testing import differences
from compression_plugins import CalibrationConfig, LearnedScaleConfig, QATConfig
from compression_plugins.learned_scale import LearnedScaleQuantizer
from probes import probe

FOUR = QATConfig(
    weight=QuantizationScheme(bits=4, granularity="channel"),
    activation=QuantizationScheme(bits=4, symmetric=False, signed=False),
)


def kinds(model: nn.Module) -> dict[str, type]:
    return {n: type(m) for n, m in model.named_modules() if isinstance(m, FakeQuantizer)}


def trained(
    model: nn.Module, *configs: Any, epochs: int = 2, data: Any = None, rate: float = 0.01
) -> tuple[Any, Any]:
    manager = prepare_compression(model, list(configs))
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    manager.track(optimizer=optimizer)
    toys.train(manager, toys.loader(data or toys.images()), optimizer, epochs)
    return manager, optimizer


# Composition -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("weights", "activations"), [(True, True), (True, False), (False, True)])
def test_the_sites_that_were_chosen_learn_wherever_the_plugin_stands(first, weights, activations):
    learned = LearnedScaleConfig(weights=weights, activations=activations)
    model = toys.mlp()
    prepare_compression(model, [learned, QATConfig()] if first else [QATConfig(), learned])
    own, other = LearnedScaleQuantizer, ObservedFakeQuantizer
    assert kinds(model) == {
        f"{layer}.{kind}_quantizer": own if wanted else other
        for layer in (0, 2)
        for kind, wanted in (("weight", weights), ("input", activations))
    }
    names = {name for name, _ in model.named_parameters() if "quantizer" in name}
    assert len(names) == 2 * weights + 4 * activations


class Third(ObservedFakeQuantizer):
    pass


@pytest.mark.parametrize("place", range(3))
def test_third_parties_win_wherever_they_stand(place):
    observer = prepare_compression(toys.mlp(), [CalibrationConfig()])._context.services

    def make_fake_quantizer(self: Any, scheme: Any, site: Any) -> Any:
        return (
            Third(scheme, site, observer.make_observer(scheme, site)) if site.layer == "0" else None
        )

    listed = [LearnedScaleConfig(), QATConfig()]
    listed.insert(place, probe(make_fake_quantizer=make_fake_quantizer))
    model = toys.mlp()
    prepare_compression(model, listed)
    assert kinds(model)["0.weight_quantizer"] is kinds(model)["0.input_quantizer"] is Third
    assert kinds(model)["2.weight_quantizer"] is LearnedScaleQuantizer


def test_dynamic_ranges_stay_dynamic():
    activation = QuantizationScheme(dynamic=True, symmetric=False)
    model = toys.mlp()
    prepare_compression(model, [QATConfig(activation=activation), LearnedScaleConfig()])
    assert kinds(model)["0.input_quantizer"] is DynamicFakeQuantizer
    assert kinds(model)["0.weight_quantizer"] is LearnedScaleQuantizer


def test_a_list_with_nothing_to_learn_is_refused():
    model = toys.mlp()
    with pytest.raises(ConfigError, match=r"no plugin places any; list QATConfig\(\)"):
        prepare_compression(model, [LearnedScaleConfig(), CalibrationConfig()])
    with pytest.raises(ConfigError, match="found no scale to learn"):
        prepare_compression(model, [QATConfig(activation=None), LearnedScaleConfig(weights=False)])
    assert not kinds(model)
    with pytest.raises(ConfigError, match="learns nothing"):
        LearnedScaleConfig(weights=False, activations=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"minimum_scale": 0.0},
            r"LearnedScaleConfig.minimum_scale must be a finite number above 0",
        ),
        (
            {"learning_rate_factor": -1.0},
            "learning_rate_factor must be a finite number of at least 0",
        ),
        ({"gradient_scaling": 1}, "gradient_scaling must be of type bool"),
        ({"weights": "all"}, "weights must be of type bool"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ConfigError, match=text):
        LearnedScaleConfig(**options)


def test_from_a_recipe(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "plugins:\n  qat: {weight: {bits: 2}}\n  learned_scale: {learning_rate_factor: 0.5}\n"
    )
    manager = prepare_compression(toys.mlp(), recipe)
    optimizer = torch.optim.SGD(manager.model.parameters(), 0.5)
    manager.track(optimizer=optimizer)
    assert optimizer.param_groups[1]["name"] == "learned_scale"
    assert optimizer.param_groups[1]["lr"] == 0.25


# Training ----------------------------------------------------------------------------------------


def test_a_step_without_an_optimizer_is_refused():
    manager = prepare_compression(toys.mlp(), [QATConfig(), LearnedScaleConfig()])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    with pytest.raises(LifecycleError, match=r"'learned_scale' created 6 parameters.*track\(opt"):
        manager.on_step_begin(0)


def test_every_parameter_learns_and_conversion_stores_what_was_trained():
    torch.manual_seed(0)
    model = toys.ConvNet()
    seen: dict[str, Tensor] = {}
    manager, _ = trained(model, FOUR, LearnedScaleConfig(), epochs=1)
    for name, value in model.named_parameters():
        if "quantizer" in name:
            seen[name] = value.detach().clone()
    toys.train(manager, toys.loader(toys.images()), manager._context.tracked["optimizer"], 2)
    moved = [n for n, v in model.named_parameters() if n in seen and not torch.equal(v, seen[n])]
    assert moved == list(seen)
    model.eval()
    converted = manager.convert(torch.randn(4, 1, 8, 8))
    for name in ("conv1", "conv2", "fc"):
        layer, deployed = model.get_submodule(name), converted.get_submodule(name)
        values = layer.weight_quantizer.quantization_parameters(layer.weight)
        codes = quantize(layer.weight.detach(), values.scale, values.zero_point, -7, 7, 0)
        signs = torch.ones(()) if name == "fc" else layer_signs(model, name)
        assert torch.equal(deployed.integer_weight().float(), codes.float() * signs)
        own = layer.input_quantizer.quantization_parameters()
        assert torch.equal(deployed.input_scale, own.scale)
        assert torch.equal(deployed.input_zero_point, own.zero_point)


def layer_signs(model: nn.Module, name: str) -> Tensor:
    """Folding a negative gamma turns the sign of a channel's integers."""
    return model.get_submodule(name.replace("conv", "bn")).weight.sign().reshape(-1, 1, 1, 1)


def test_observing_and_quantizing_may_begin_at_once():
    model = toys.mlp()
    config = QATConfig(observe_at=StartAt(step=0), fake_quantize_at=StartAt(step=0))
    manager, _ = trained(model, config, LearnedScaleConfig(), epochs=1, data=toys.vectors())
    assert all(m.started for m in model.modules() if isinstance(m, LearnedScaleQuantizer))
    manager.convert(torch.randn(2, 6))


def test_freezing_stops_the_scales_of_inputs_alone():
    torch.manual_seed(0)
    model = toys.mlp()
    config = QATConfig(freeze_observers_at=StartAt(step=4))
    manager, optimizer = trained(model, config, LearnedScaleConfig(), epochs=2, data=toys.vectors())
    before = {n: v.detach().clone() for n, v in model.named_parameters() if "quantizer" in n}
    toys.train(manager, toys.loader(toys.vectors()), optimizer, 3)
    for name, value in model.named_parameters():
        if name in before:
            assert torch.equal(value, before[name]) == ("input" in name), name


def test_tied_layers_share_their_scale_and_convert():
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, input: Tensor) -> Tensor:
            return self.second(self.first(input).relu())

    model = Tied()
    manager, _ = trained(model, FOUR, LearnedScaleConfig(), data=toys.vectors())
    assert model.first.weight_quantizer is model.second.weight_quantizer
    assert model.first.input_quantizer is not model.second.input_quantizer
    converted = manager.convert(torch.randn(8, 6))
    assert torch.equal(converted.first.weight_scale, converted.second.weight_scale)


def test_layers_of_several_parts():
    torch.manual_seed(0)

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, input: Tensor) -> Tensor:
            rows = input.unsqueeze(1)
            return self.attention(rows, rows, rows, need_weights=False)[0].squeeze(1)

    model = Attending()
    manager, optimizer = trained(model, FOUR, LearnedScaleConfig(), data=toys.vectors())
    assert set(kinds(model).values()) == {LearnedScaleQuantizer}
    assert len(optimizer.param_groups[1]["params"]) == 4 + 2 * 4
    manager.convert(torch.randn(8, 6))


# Undoing and resuming ----------------------------------------------------------------------------


def test_close_gives_the_float_model_and_the_optimizer_back():
    torch.manual_seed(0)
    model = toys.mlp()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, 0.1)
    manager = prepare_compression(model, [QATConfig(), LearnedScaleConfig()])
    manager.track(optimizer=optimizer)
    toys.train(manager, toys.loader(toys.vectors()), optimizer, 1)
    manager.close()
    assert list(model.state_dict()) == keys
    assert [id(value) for value in model.parameters()] == [id(value) for value in parameters]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4]
    assert set(optimizer.state) == set(parameters)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumes_to_the_last_bit_from_every_step(optimizer, accumulate):
    setup = resuming.Setup(optimizer=optimizer, accumulate=accumulate)
    plugins = [LearnedScaleConfig(learning_rate_factor=0.5)]
    states: list[Any] = []

    def save(manager: Any, count: int) -> None:
        states.append(copy.deepcopy(manager.state_dict()))

    whole = resuming.Training.start(setup, plugins=plugins)
    whole.run(save)
    assert len(states) == resuming.EPOCHS * resuming.STEPS
    for count in (0, 3, 10):
        resumed = resuming.Training.start(setup, seed=99, plugins=plugins)
        resumed.manager.load_state_dict(states[count])
        resumed.run()
        assert resumed.losses == whole.losses[count + 1 :]
        assert differences(resumed.final(), whole.final()) == []


# torch.compile itself instantiates the class while it traces.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")
def test_compiled_and_exported():
    torch.manual_seed(0)
    model = toys.mlp()
    trained(model, QATConfig(), LearnedScaleConfig(), epochs=1, data=toys.vectors())
    input = torch.randn(3, 6)
    gradients = []
    for called in (model, torch.compile(model, backend="eager", fullgraph=True)):
        model.zero_grad()
        called(input).square().sum().backward()
        gradients.append([value.grad for value in model.parameters()])
    assert all(map(torch.equal, *gradients))
    model.eval()
    exported = torch.export.export(model, (input,))
    listed = [str(node.target) for node in exported.graph.nodes]
    assert listed.count("compression_manager.fake_quantize.default") == 4
    assert torch.equal(exported.module()(input), model(input))
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(model, (input,), dynamic_shapes=dynamic)
    assert torch.equal(exported.module()(input[:3]), model(input[:3]))
