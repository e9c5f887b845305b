"""When ranges are observed, when values are quantized, and what freezing stops."""

import copy

import pytest
import torch
from torch import nn

import toys
from compression_manager import prepare_compression
from compression_manager.training.schedule import StartAt
from compression_plugins.fake_quant import QATConfig
from quantization_reference import (
    activation_grid,
    averaged_range,
    fake_quantized,
    prepared,
    step,
    weight_grid,
)

FIRST, SECOND, THIRD = (scale * toys.vectors().tensors[0][:8] for scale in (1.0, 3.0, 0.5))


def phases(manager):
    """The phases of every quantizer, which must agree: (observing, quantizing)."""
    found = {
        tuple(quantizer.phase)
        for module in manager.model.modules()
        if hasattr(module, "quantizers")
        for quantizer in module.quantizers()
    }
    assert len(found) == 1
    return found.pop()


def buffers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def run_epochs(manager, count, steps=2, start=0):
    """Return the phases in each step."""
    seen = []
    for epoch in range(start, start + count):
        manager.on_epoch_begin(epoch)
        manager.model.train()
        for index in range(steps):
            step(manager, FIRST, index)
            seen.append(phases(manager))
        manager.on_epoch_end()
    return seen


def test_the_default_observes_in_the_first_step_and_quantizes_from_the_second():
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    exact = copy.deepcopy(layer)
    manager = prepared(layer)
    assert torch.equal(layer(FIRST), exact(FIRST))  # before any step: float, nothing observed
    assert not layer.input_quantizer.is_calibrated()
    outputs = [step(manager, batch, index) for index, batch in enumerate((FIRST, SECOND, THIRD))]
    assert torch.equal(outputs[0], exact(FIRST))
    weight = layer.weight.detach().numpy()
    quantized_weight = torch.from_numpy(fake_quantized(weight, weight_grid(weight), 0)[0])
    for count, batch in ((2, SECOND), (3, THIRD)):
        grid = activation_grid(*averaged_range([FIRST, SECOND, THIRD][:count]))
        values = torch.from_numpy(fake_quantized(batch.numpy(), grid)[0])
        expected = nn.functional.linear(values, quantized_weight, layer.bias)
        torch.testing.assert_close(outputs[count - 1], expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(expected, exact(batch), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"observe_at": StartAt(step=2)}, ["-", "q", "oq", "oq", "oq", "oq"]),
        ({"observe_at": StartAt(epoch=1)}, ["-", "q", "oq", "oq", "oq", "oq"]),
        ({"fake_quantize_at": StartAt(step=0)}, ["oq"] * 6),
        ({"fake_quantize_at": StartAt(step=3)}, ["o", "o", "o", "oq", "oq", "oq"]),
        ({"fake_quantize_at": StartAt(epoch=2)}, ["o", "o", "o", "o", "oq", "oq"]),
        ({"freeze_observers_at": StartAt(step=3)}, ["o", "oq", "oq", "q", "q", "q"]),
        ({"freeze_observers_at": StartAt(epoch=1)}, ["o", "oq", "q", "q", "q", "q"]),
    ],
)
def test_each_phase_starts_at_its_step_or_epoch(options, expected):
    manager = prepare_compression(toys.mlp(), [QATConfig(**options)])
    manager.on_train_begin()
    seen = run_epochs(manager, 3)
    assert ["o" * o + "q" * q or "-" for o, q in seen] == expected


def test_a_layer_quantizes_its_input_only_once_it_has_a_range():
    layer = nn.Linear(6, 3)
    manager = prepared(layer, observe_at=StartAt(step=2))
    for index in range(2):
        output = step(manager, FIRST, index)
    expected = nn.functional.linear(FIRST, layer.quantized_weight(), layer.bias)
    assert torch.equal(output, expected)


def test_accumulated_losses_count_as_one_step():
    manager = prepared(toys.mlp())
    seen = []
    for index in range(4):
        manager.on_step_begin(index)
        seen.append(phases(manager))
        output = manager.model(FIRST)
        manager.on_after_compute_loss(FIRST, output, output.square().mean()).backward()
        if index % 2:
            manager.on_before_optimizer_step()
        manager.on_step_end()
    assert seen == [(True, False), (True, False), (True, True), (True, True)]


def test_frozen_ranges_do_not_follow_the_data():
    layer = nn.Linear(6, 3)
    manager = prepared(layer, [FIRST, SECOND], freeze_observers_at=StartAt(step=2))
    before = buffers(layer.input_quantizer)
    step(manager, 100 * FIRST, 2)
    after = buffers(layer.input_quantizer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["observing"]


def test_evaluation_changes_no_buffer():
    manager = prepared(toys.ConvNet(), [toys.images().tensors[0]] * 2)
    before = buffers(manager.model)
    manager.on_before_eval()
    manager.model.eval()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            manager.model(100 * toys.images(seed=1).tensors[0])
    manager.on_after_eval({"accuracy": 0.0})
    after = buffers(manager.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_evaluation_in_train_mode_changes_no_range():
    manager = prepared(toys.mlp(), [FIRST] * 2)
    before = buffers(manager.model)
    manager.on_before_eval()
    with torch.no_grad():
        manager.model(100 * FIRST)
    manager.on_after_eval({"accuracy": 0.0})
    assert same(before, buffers(manager.model))
    assert phases(manager) == (True, True)
    step(manager, 100 * FIRST, 2)
    assert not same(before, buffers(manager.model))


# BatchNorm --------------------------------------------------------------------------------------


def batch_norm_state(model):
    return {name: value for name, value in buffers(model).items() if ".running" in name}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("start", "first_frozen"), [(StartAt(step=0), 0), (StartAt(step=3), 3), (StartAt(epoch=1), 2)]
)
def test_batch_norm_statistics_freeze_at_their_step_or_epoch(start, first_frozen):
    model = toys.ConvNet()
    manager = prepare_compression(model, [QATConfig(freeze_batch_norm_at=start)])
    manager.on_train_begin()
    images = toys.images().tensors[0]
    frozen = []
    for epoch in range(3):
        manager.on_epoch_begin(epoch)
        for index in range(2):
            model.train()  # does not unfreeze, whether before the step ...
            before = batch_norm_state(model)
            manager.on_step_begin(index)
            frozen.append(not (model.bn1.training or model.bn2.training))
            if index:
                model.train()  # ... or in it
            output = model(images)
            manager.on_after_compute_loss(images, output, output.square().mean())
            manager.on_before_optimizer_step()
            manager.on_step_end()
            frozen.append(same(before, batch_norm_state(model)))
        manager.on_epoch_end()
    assert frozen == [index // 2 >= first_frozen for index in range(12)]
    assert model.training
    assert model.conv1.training


def test_closing_lets_batch_norm_train_again_unless_the_user_froze_it():
    model = toys.ConvNet()
    model.train()
    model.bn2.eval()
    images = toys.images().tensors[0]
    manager = prepare_compression(model, [QATConfig(freeze_batch_norm_at=StartAt(step=0))])
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    step(manager, images)
    manager.on_epoch_end()
    assert not model.bn1.training
    manager.close()
    assert model.bn1.training
    assert not model.bn2.training
    model.train()
    before = batch_norm_state(model)
    model(images)
    after = batch_norm_state(model)
    assert not any(torch.equal(before[name], after[name]) for name in before)


# Resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs_before", [1, 2])
def test_phases_and_ranges_survive_a_restart(epochs_before):
    options = {
        "fake_quantize_at": StartAt(step=3),
        "freeze_observers_at": StartAt(epoch=2),
        "freeze_batch_norm_at": StartAt(epoch=2),
    }

    def build():
        torch.manual_seed(0)
        model = toys.mlp()
        return prepare_compression(model, [QATConfig(**options)])

    whole = build()
    whole.on_train_begin()
    expected = run_epochs(whole, 4)

    first = build()
    first.on_train_begin()
    seen = run_epochs(first, epochs_before)
    state = copy.deepcopy(first.state_dict())
    second = build()
    second.load_state_dict(state)
    assert phases(second) == seen[-1]
    second.model.eval(), first.model.eval()
    assert torch.equal(second.model(FIRST), first.model(FIRST))
    second.on_train_begin()
    seen += run_epochs(second, 4 - epochs_before, start=epochs_before)
    assert seen == expected
    assert same(buffers(whole.model), buffers(second.model))


def test_conv_batch_norm_pairs_survive_a_restart():
    manager = prepared(toys.ConvNet(), [toys.images().tensors[0]])
    manager.on_epoch_end()
    other = prepare_compression(toys.ConvNet(), [QATConfig()])
    assert {layer.name for layer in other.report().layers if "folded" in layer.detail} == set()
    other.load_state_dict(copy.deepcopy(manager.state_dict()))
    folded = {layer.name for layer in other.report().layers if "folded" in layer.detail}
    assert folded == {"bn1", "bn2"}


def test_a_float_state_dict_loads_strictly_and_keeps_the_ranges():
    torch.manual_seed(0)
    manager = prepared(toys.ConvNet(), [toys.images().tensors[0]] * 2)
    model = manager.model
    ranges = {name: value for name, value in buffers(model).items() if "quantizer" in name}
    assert ranges
    source = toys.ConvNet()
    model.load_state_dict(source.state_dict(), strict=True)
    now = buffers(model)
    assert same(source.state_dict(), now)
    assert same(ranges, now)
    assert phases(manager) == (True, True)
