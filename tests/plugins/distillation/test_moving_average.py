"""The mean teacher: an average of the student's own weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

import toys
from compression_manager import CheckpointMismatchError, ConfigError, prepare_compression
from compression_plugins import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    QATConfig,
)
from toy_teachers import criterion


def train(model, *others, decay=0.9, steps=5, which=None):
    """Return the plugin's average after each step, and the model's weights."""
    config = DistillationConfig(
        teacher_outputs="ema", ema_decay=decay, criterion=which or criterion("KL", 2.0)
    )
    manager = prepare_compression(model, [*others, config])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager.track(optimizer=optimizer)
    weights = [model.conv1.weight.detach().clone()]
    averages = []
    plugin = next(item for item in manager._plugins if item.name == "distillation")
    torch.manual_seed(1)
    batches = [batch for _, batch in zip(range(steps), toys.loader(toys.images(64)), strict=False)]

    def note(epoch, step, loss):
        weights.append(model.conv1.weight.detach().clone())
        averages.append(plugin.state_dict()["average"]["conv1.weight"].clone())

    toys.train(manager, batches, optimizer, 1, after_step=note)
    return manager, weights, averages


def test_the_average_starts_as_a_mean_and_then_decays():
    torch.manual_seed(0)
    _, weights, averages = train(toys.ConvNet(), decay=0.6)
    expected = weights[0].double()
    for update, weight in enumerate(weights[1:]):
        decay = min(0.6, update / (update + 1))
        expected = decay * expected + (1 - decay) * weight.double()
        torch.testing.assert_close(averages[update].double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(averages[-1], weights[-1])


def test_buffers_are_copied():
    manager, _, _ = train(toys.ConvNet(), decay=0.6)
    average = manager._plugins[0].state_dict()["average"]
    buffers = dict(manager.model.named_buffers())
    assert buffers["bn1.running_mean"].count_nonzero() > 0
    assert all(torch.equal(average[name], value) for name, value in buffers.items())


def test_the_student_learns_from_the_average():
    torch.manual_seed(0)
    manager, _, _ = train(toys.ConvNet(), decay=0.6)
    plugin = manager._plugins[0]
    inputs = toys.images(8, seed=5).tensors[0]
    manager.on_train_begin()
    manager.on_epoch_begin(1)
    manager.on_step_begin(0)
    output = manager.model(inputs)
    total = manager.on_after_compute_loss(inputs, output, output.mean() * 0)
    average = toys.ConvNet()
    average.load_state_dict(plugin.state_dict()["average"])
    with torch.no_grad():
        teacher = average.eval()(inputs)
    expected = F.kl_div(
        F.log_softmax(output / 2, 1), F.log_softmax(teacher / 2, 1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    assert total.item() == pytest.approx(0.5 * 4 * expected.item(), rel=1e-4)


@pytest.mark.parametrize("qat_first", [True, False])
def test_the_average_stays_a_float_model_beside_quantization(qat_first):
    torch.manual_seed(0)
    config = DistillationConfig(teacher_outputs="ema", criterion=criterion())
    plugins = [QATConfig(), config] if qat_first else [config, QATConfig()]
    manager = prepare_compression(toys.ConvNet(), plugins)
    plugin = next(item for item in manager._plugins if item.name == "distillation")
    assert set(plugin.state_dict()["average"]) == set(toys.ConvNet().state_dict())


def test_layers_of_the_average_can_be_watched():
    which = IntermediateLayersKnowledgeDistillationLossConfig(["conv2"])
    manager, _, _ = train(toys.ConvNet(), which=which)
    assert "features kept per step" in manager.report().notes["distillation"]


def test_it_survives_a_restart_bit_for_bit():
    torch.manual_seed(0)
    model = toys.ConvNet()
    start = copy.deepcopy(model)
    manager, _, _ = train(model)
    state = copy.deepcopy(manager.state_dict())
    config = DistillationConfig(teacher_outputs="ema", ema_decay=0.9, criterion=criterion("KL", 2))
    fresh = prepare_compression(start, [config])
    fresh.track(optimizer=torch.optim.SGD(start.parameters(), 0.1))
    fresh.load_state_dict(state)
    toys.assert_identical(
        fresh.state_dict()["plugins"]["distillation"], state["plugins"]["distillation"]
    )


def test_another_source_is_refused_on_resume():
    model = toys.ConvNet()
    state = copy.deepcopy(train(model)[0].state_dict())
    for name in ("teacher", "caller"):
        config = (
            DistillationConfig(toys.ConvNet())
            if name == "teacher"
            else DistillationConfig(teacher_outputs="caller")
        )
        fresh_model = toys.ConvNet()
        fresh = prepare_compression(fresh_model, [config])
        fresh.track(optimizer=torch.optim.SGD(fresh_model.parameters(), 0.1))
        with pytest.raises(CheckpointMismatchError, match=r"plugin 'distillation'.*teacher"):
            fresh.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.5}, "ema_decay must be a number from 0 to 1"),
        ({"teacher_model": toys.mlp()}, "teacher_model has no use with teacher_outputs='ema'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(teacher_outputs="ema", **options)
