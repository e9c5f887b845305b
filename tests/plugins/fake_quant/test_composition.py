"""Quantization-aware training beside autocast, torch.compile and the metrics of other plugins."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import toys
from compression_manager import Plugin, hookimpl, prepare_compression
from compression_manager.plugin import PluginConfig
from compression_plugins.fake_quant import QATConfig
from quantization_reference import prepared, step, weight_grid

VECTORS = toys.vectors().tensors[0]


@pytest.mark.parametrize("build", [toys.mlp, toys.ConvNet])
def test_training_under_autocast_learns(build):
    torch.manual_seed(0)
    data = toys.vectors() if build is toys.mlp else toys.images()
    inputs, targets = data.tensors
    model = build()
    manager = prepare_compression(model, [QATConfig()])
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    losses = []
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for index in range(30):
        manager.on_step_begin(index)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(inputs)
            loss = nn.functional.cross_entropy(output, targets)
        manager.on_after_compute_loss(inputs, output, loss).backward()
        manager.on_before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        manager.on_step_end()
        losses.append(float(loss.detach()))
    assert output.dtype == torch.bfloat16
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    converted = manager.convert(inputs)
    model.eval()
    torch.testing.assert_close(converted(inputs), model(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [toys.mlp, toys.ConvNet])
@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_compiles_once_per_phase(build, with_inputs):
    torch.manual_seed(0)
    inputs = (toys.vectors() if build is toys.mlp else toys.images()).tensors[0]
    model, twin = build(), build()
    twin.load_state_dict(model.state_dict())
    compiles = []

    def backend(graph, example_inputs):
        compiles.append(graph)
        return graph.forward

    torch._dynamo.reset()
    managers = [
        prepare_compression(item, [QATConfig()], example_inputs=inputs if with_inputs else None)
        for item in (model, twin)
    ]
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    counts = []
    for manager in managers:
        manager.on_train_begin()
        manager.on_epoch_begin(0)
    for index in range(6):
        outputs = []
        for manager, call in zip(managers, (compiled, twin), strict=True):
            manager.on_step_begin(index)
            output = call(inputs)
            manager.on_after_compute_loss(inputs, output, output.square().mean()).backward()
            manager.on_before_optimizer_step()
            manager.on_step_end()
            outputs.append(output)
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
        counts.append(len(compiles))
    assert counts == [1, 2, 2, 2, 2, 2]
    torch._dynamo.reset()
    expected = {module for module in ("bn1", "bn2") if hasattr(model, module)}
    for manager in managers:
        converted = manager.convert(inputs)
        assert {
            name for name, module in converted.named_modules() if isinstance(module, nn.Identity)
        } == expected


def test_observing_a_forward_pass_does_not_change_it():
    images = toys.images().tensors[0]
    results = []
    for example_inputs in (images, None):  # observed at prepare, or in the step
        torch.manual_seed(0)
        model = toys.ConvNet(dropout=0.5)
        manager = prepare_compression(model, [QATConfig()], example_inputs=example_inputs)
        manager.on_train_begin()
        manager.on_epoch_begin(0)
        output = step(manager, images)
        results.append([output, *(parameter.grad for parameter in model.parameters())])
        results[-1] += [torch.rand(1), *model.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Metrics ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DetailsConfig(PluginConfig):
    plugin: ClassVar[str] = "details"


class Details(Plugin[DetailsConfig]):
    """Asks for details in every step and keeps what arrives."""

    config_class = DetailsConfig

    def __init__(self, config):
        super().__init__(config)
        self.seen = {}

    @hookimpl
    def on_step_begin(self, context):
        context.request_details()

    @hookimpl
    def consume_metrics(self, metrics):
        self.seen = {metric.name: metric for metric in metrics}


def test_scales_and_ranges_of_every_layer_are_published():
    torch.manual_seed(0)
    model = toys.mlp()
    details = Details(DetailsConfig())
    manager = prepare_compression(model, [QATConfig(), details])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    step(manager, VECTORS)
    names = {name for name in details.seen if name.startswith("quantization/")}
    assert names == {
        f"quantization/{layer}/{name}"
        for layer in ("0", "2")
        for name in (
            "weight", "weight/scale", "weight/scales", "weight/range_min", "weight/range_max",
            "input/scale", "input/zero_point", "input/range_min", "input/range_max",
        )
    }  # fmt: skip
    scale, _, _, top = weight_grid(model[0].weight.detach().numpy())
    value = {name: metric.value for name, metric in details.seen.items()}
    assert float(value["quantization/0/weight/scale"]) == pytest.approx(scale.mean())
    assert float(value["quantization/0/weight/range_max"]) == pytest.approx(scale.max() * top)
    assert details.seen["quantization/0/weight"].kind == "histogram"
    low, high = min(float(VECTORS.min()), 0), max(float(VECTORS.max()), 0)
    assert float(value["quantization/0/input/scale"]) == pytest.approx((high - low) / 255)
    assert float(value["quantization/0/input/zero_point"]) == round(-low / (high - low) * 255)
    tolerance = (high - low) / 255
    assert float(value["quantization/0/input/range_min"]) == pytest.approx(low, abs=tolerance)
    assert float(value["quantization/0/input/range_max"]) == pytest.approx(high, abs=tolerance)


def test_a_layer_that_was_not_used_yet_publishes_its_weight_alone():
    details = Details(DetailsConfig())
    model = nn.ModuleDict({"used": nn.Linear(6, 2), "unused": nn.Linear(6, 2)})
    model.forward = lambda input: model["used"](input)
    manager = prepare_compression(model, [QATConfig(), details])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    step(manager, VECTORS)
    assert "quantization/used/input/scale" in details.seen
    assert "quantization/unused/weight/scale" in details.seen
    assert "quantization/unused/input/scale" not in details.seen


def test_a_model_of_one_layer_has_names_without_a_gap():
    details = Details(DetailsConfig())
    manager = prepare_compression(nn.Linear(6, 2), [QATConfig(), details])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    step(manager, VECTORS)
    assert "quantization/weight/scale" in details.seen
    assert prepared(nn.Linear(6, 2)).model.weight_quantizer is not None
