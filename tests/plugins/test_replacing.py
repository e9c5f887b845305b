"""Third-party plugins take over from the built-in ones, from Python and from a recipe.

They are installed as everybody's are: a distribution on the path declares entry points.
"""

import copy
import itertools
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import toys
from compression_manager import (
    ConfigError,
    Plugin,
    PluginConfig,
    hookimpl,
    option,
    prepare_compression,
)
from compression_manager.deploy import load
from compression_manager.quantization import (
    FakeQuantizer,
    Observer,
    Phase,
    QuantizationParameters,
    fake_quantize,
)
from compression_plugins import (
    CalibrationConfig,
    DistillationConfig,
    KnowledgeDistillationLossConfig,
    QATConfig,
)
from compression_plugins.calibration import MinMaxObserver
from toy_teachers import begin

# An observer -------------------------------------------------------------------------------------


class FixedObserver(Observer):
    """Answers [-limit, limit], whatever it sees."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.register_buffer("limit", torch.tensor(limit))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def observe(self, input: Tensor) -> None:
        self.batches.add_(1)

    def compute_range(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return -self.limit, self.limit

    def observed_range(self) -> tuple[Tensor, Tensor]:
        return -self.limit, self.limit

    def has_observed(self) -> bool:
        return bool(self.batches)


@dataclass(frozen=True)
class FixedObserverConfig(PluginConfig):
    plugin: ClassVar[str] = "fixed_observer"
    limit: float = 3.0


class FixedObserverPlugin(Plugin[FixedObserverConfig]):
    config_class = FixedObserverConfig

    @hookimpl
    def make_observer(self, scheme, site):
        return FixedObserver(self.config.limit) if site.role == "activation" else None


# A fake quantizer --------------------------------------------------------------------------------


class PowerOfTwoQuantizer(FakeQuantizer):
    """Rounds the scale of the largest magnitude seen up to a power of two."""

    def __init__(self, scheme: Any, site: Any) -> None:
        super().__init__(scheme, site)
        self.register_buffer("peak", torch.zeros(site.range_shape(scheme)))
        self.register_buffer("switches", torch.zeros(2, dtype=torch.bool))

    @property
    def phase(self) -> Phase:
        return Phase(bool(self.switches[0]), bool(self.switches[1]))

    def set_phase(self, *, observing: bool, quantizing: bool) -> None:
        self.switches.copy_(torch.tensor([observing, quantizing]))

    def is_calibrated(self) -> bool:
        return self.site.role == "weight" or bool(self.peak.max() > 0)

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.phase.observing:
            self.peak.copy_(torch.maximum(self.peak, self._peak(input)))
        if not (self.phase.quantizing and self.is_calibrated()):
            return input
        parameters = self.quantization_parameters(input)
        return fake_quantize(
            input,
            parameters.scale,
            parameters.zero_point,
            parameters.quant_min,
            parameters.quant_max,
            parameters.axis,
        )

    def quantization_parameters(self, input: Tensor | None = None) -> QuantizationParameters:
        scheme = self.scheme
        peak = self._peak(input) if self.site.role == "weight" else self.peak
        zero_point = 0 if scheme.signed else (scheme.quant_max + 1) // 2
        steps = scheme.quant_max - zero_point
        scale = torch.exp2(torch.ceil(torch.log2((peak / steps).clamp(min=1e-6))))
        zero_points = torch.full_like(scale, zero_point, dtype=torch.int32)
        return QuantizationParameters(
            scale, zero_points, scheme.quant_min, scheme.quant_max, scheme.axis
        )

    def _peak(self, input: Tensor) -> Tensor:
        magnitudes = input.detach().abs()
        return magnitudes.max() if self.scheme.axis is None else magnitudes.flatten(1).amax(1)


@dataclass(frozen=True)
class PowerOfTwoConfig(PluginConfig):
    plugin: ClassVar[str] = "power_of_two"


class PowerOfTwoPlugin(Plugin[PowerOfTwoConfig]):
    config_class = PowerOfTwoConfig

    @hookimpl
    def make_fake_quantizer(self, scheme, site):
        return PowerOfTwoQuantizer(scheme, site)


# A distillation loss -----------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnLossConfig(PluginConfig):
    plugin: ClassVar[str] = "own_loss"
    replaced: str = "my_loss"


class OwnLossPlugin(Plugin[OwnLossConfig]):
    """The mean p-th power of the difference, over T^p; does not detach the teacher."""

    config_class = OwnLossConfig

    @hookimpl
    def make_distillation_loss(self, name, options):
        if name != self.config.replaced:
            return None
        power, temperature = options.get("power", 4), options["temperature"]
        return lambda student, teacher: ((student - teacher) / temperature).pow(power).mean()


# A checkpoint store and a metric sink ------------------------------------------------------------


@dataclass(frozen=True)
class MemoryConfig(PluginConfig):
    plugin: ClassVar[str] = "memory"
    memory: list[Any] = field(
        default_factory=list, metadata=option("Where states are kept.", runtime=True)
    )


class MemoryPlugin(Plugin[MemoryConfig]):
    config_class = MemoryConfig

    @hookimpl
    def on_epoch_end(self, context):
        self.config.memory.append(copy.deepcopy(context.collect_state()))


@dataclass(frozen=True)
class SinkConfig(PluginConfig):
    plugin: ClassVar[str] = "sink"
    sink: list[Any] = field(
        default_factory=list, metadata=option("Where metrics go.", runtime=True)
    )


class SinkPlugin(Plugin[SinkConfig]):
    config_class = SinkConfig

    @hookimpl
    def on_step_begin(self, context):
        context.request_details()

    @hookimpl
    def consume_metrics(self, metrics):
        self.config.sink.extend(metrics)


# Tests -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _installed(tmp_path, monkeypatch):
    """A distribution that declares the plugins above."""
    plugins = (
        FixedObserverPlugin,
        PowerOfTwoPlugin,
        OwnLossPlugin,
        MemoryPlugin,
        SinkPlugin,
    )
    folder = tmp_path / "site" / "own_plugins-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: own-plugins\nVersion: 1.0\n")
    entries = [f"{item.config_class.plugin} = {__name__}:{item.__name__}" for item in plugins]
    (folder / "entry_points.txt").write_text(
        "\n".join(["[compression_manager.plugins.v1]", *entries]) + "\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    torch.manual_seed(0)


@pytest.fixture(params=["python", "recipe"])
def prepare(request, tmp_path):
    """Prepares a model from configs, or from a recipe of the same content."""

    def prepared(model, recipe, configs, **runtime):
        if request.param == "python":
            return prepare_compression(model, configs)
        path = tmp_path / "recipe.yaml"
        path.write_text("plugins:\n" + "".join(f"  {line}\n" for line in recipe))
        return prepare_compression(model, path, **runtime)

    return prepared


def train(manager, epochs=2, **options):
    optimizer = torch.optim.SGD(manager.model.parameters(), 0.05, momentum=0.9)
    manager.track(optimizer=optimizer)
    return toys.train(manager, toys.loader(toys.images()), optimizer, epochs, **options)


ITEMS = {
    "fixed_observer": FixedObserverConfig(limit=5.0),
    "qat": QATConfig(),
    "calibration": CalibrationConfig(),
}


@pytest.mark.parametrize(
    "order",
    [
        *itertools.permutations(["fixed_observer", "qat"]),
        *itertools.permutations(["fixed_observer", "qat", "calibration"]),
    ],
)
def test_an_observer_for_activations_only(prepare, order):
    lines = {"fixed_observer": "fixed_observer: {limit: 5.0}"}
    model = toys.ConvNet()
    manager = prepare(
        model, [lines.get(name, f"{name}: {{}}") for name in order], [ITEMS[name] for name in order]
    )
    for layer in (model.conv1, model.conv2, model.fc):
        assert isinstance(layer.input_quantizer.observer, FixedObserver)
        assert isinstance(layer.weight_quantizer.observer, MinMaxObserver)
    train(manager)
    assert model.conv1.input_quantizer.scale.item() == pytest.approx(10 / 255)
    assert int(model.conv1.input_quantizer.observer.batches) == 8
    converted = manager.convert()
    assert converted.conv1.input_scale.item() == pytest.approx(10 / 255)


@pytest.mark.parametrize("order", list(itertools.permutations(["power_of_two", "qat"])))
def test_a_fake_quantizer(prepare, order, tmp_path):
    items = {"power_of_two": PowerOfTwoConfig(), "qat": QATConfig()}
    model = toys.ConvNet()
    manager = prepare(model, [f"{name}: {{}}" for name in order], [items[name] for name in order])
    assert isinstance(model.fc.weight_quantizer, PowerOfTwoQuantizer)
    assert isinstance(model.fc.input_quantizer, PowerOfTwoQuantizer)
    losses = train(manager, 4)
    assert losses[-1] < losses[0]
    model.eval()
    parameters = model.fc.input_quantizer.quantization_parameters()
    assert torch.log2(parameters.scale).frac() == 0
    inputs = toys.images(64, seed=5).tensors[0]
    converted = manager.convert(inputs)
    assert torch.equal(converted.fc.input_scale, parameters.scale)
    assert torch.log2(converted.fc.weight_scale).frac().count_nonzero() == 0
    torch.testing.assert_close(converted(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    directory = manager.save_converted(tmp_path / "converted")
    assert torch.equal(load(directory, toys.ConvNet())(inputs), converted(inputs))


def own_loss(order, name="my_loss", options=None):
    """The recipe's lines and the configs of a loss that a plugin offers."""
    criterion = KnowledgeDistillationLossConfig(2.0, ["CE", name], [0.25, 0.5], options or {})
    lines = {
        "own_loss": f"own_loss: {{replaced: {name}}}",
        "distillation": "distillation: "
        + json.dumps(
            {
                "teacher_outputs": "caller",
                "criterion": {
                    "temperature": 2.0,
                    "loss_types": ["CE", name],
                    "loss_weights": [0.25, 0.5],
                    "loss_options": options or {},
                },
            }
        ),
    }
    configs = {
        "own_loss": OwnLossConfig(name),
        "distillation": DistillationConfig(criterion=criterion, teacher_outputs="caller"),
    }
    return [lines[item] for item in order], [configs[item] for item in order]


LOSS_ORDERS = list(itertools.permutations(["own_loss", "distillation"]))


@pytest.mark.parametrize("order", LOSS_ORDERS)
@pytest.mark.parametrize(
    ("name", "options", "power"), [("my_loss", {"power": 6}, 6), ("my_loss", {}, 4), ("CE", {}, 4)]
)
def test_a_distillation_loss(prepare, order, name, options, power):
    model = toys.mlp()
    manager = begin(prepare(model, *own_loss(order, name, options)))
    inputs, targets = toys.vectors(8).tensors
    teacher_output = torch.randn(8, toys.CLASSES, requires_grad=True)
    output = model(inputs)
    task = F.cross_entropy(output, targets)
    loss = manager.on_after_compute_loss(inputs, output, task, teacher_output)
    distance = ((output - teacher_output).detach().double() / 2).abs().pow(power).mean()
    assert loss.item() == pytest.approx((0.25 * task + 0.5 * distance).item(), rel=1e-5)
    loss.backward()
    assert teacher_output.grad is None


def test_a_distillation_loss_that_nobody_offers(prepare):
    recipe, configs = own_loss(["distillation"])
    with pytest.raises(ConfigError, match="no plugin offers the distillation loss 'my_loss'"):
        prepare(toys.mlp(), recipe, configs)


def test_a_checkpoint_store(prepare):
    teacher = toys.ConvNet(6)
    start = toys.ConvNet(dropout=0.3)

    def prepared(memory):
        torch.manual_seed(1)
        return prepare(
            copy.deepcopy(start),
            ["distillation: {}", "memory: {}", "qat: {}"],
            [DistillationConfig(teacher), MemoryConfig(memory), QATConfig()],
            teacher_model=teacher,
            memory=memory,
        )

    memory, again = [], []
    manager = prepared(memory)
    losses = train(manager, 3)
    assert [state["epoch"] for state in memory] == [1, 2, 3]
    fresh = prepared(again)
    optimizer = torch.optim.SGD(fresh.model.parameters(), 0.05, momentum=0.9)
    fresh.track(optimizer=optimizer)
    fresh.load_state_dict(memory[0])
    assert fresh.position.epoch == 1
    torch.rand(3)  # must not shift the continued run
    resumed = toys.train(fresh, toys.loader(toys.images()), optimizer, 3)
    assert resumed == losses[4:]
    toys.assert_identical(again, memory[1:])


def test_a_metric_sink(prepare):
    sink = []
    teacher = toys.ConvNet(6)
    manager = prepare(
        toys.ConvNet(),
        ["sink: {}", "distillation: {}", "qat: {}"],
        [SinkConfig(sink), DistillationConfig(teacher), QATConfig()],
        teacher_model=teacher,
        sink=sink,
    )
    losses = train(manager, 2)
    totals = [metric for metric in sink if metric.name == "loss/total"]
    assert [metric.as_float() for metric in totals] == losses
    assert [metric.global_step for metric in totals] == list(range(8))
    evaluations = [metric.as_float() for metric in sink if metric.name == "eval/loss"]
    assert evaluations == [losses[3], losses[7]]
    names = {metric.name for metric in sink}
    assert {"loss/task", "loss/distillation/CE", "learning_rate"} <= names
    assert any(name.endswith("scale") for name in names)
    assert {"scalar", "histogram"} == {metric.kind for metric in sink}
