"""Keeping the outputs of layers: when, of which call, and for whom."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError, prepare_compression
from compression_manager.models.hooks import ModelHooks
from compression_plugins import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
)
from compression_plugins.distillation.criteria.recorder import Recorder
from toy_teachers import begin

INPUTS = toys.vectors(4).tensors[0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return toys.mlp()


@pytest.fixture
def hooks():
    return ModelHooks()


@pytest.fixture
def recorder(model, hooks):
    return Recorder(model, ["0", "2", "0"], hooks, where="student")


def test_it_keeps_the_last_output_while_it_is_on(model, recorder):
    model(INPUTS)
    recorder.start()
    model(INPUTS + 1)
    output = model(INPUTS)
    assert recorder.output("2") is output
    assert torch.equal(recorder.output("0"), model[0](INPUTS))
    recorder.stop()
    model(INPUTS)
    with pytest.raises(ConfigError, match="student's layer '2' was not called"):
        recorder.output("2")


def test_of_several_passes_that_which_led_to_the_output_counts(model, recorder):
    recorder.start()
    one = model(INPUTS)
    two = model(INPUTS + 1)
    with torch.no_grad():
        model(INPUTS + 2)
    for output, inputs in ((one, INPUTS), (two, INPUTS + 1), (None, INPUTS + 1)):
        assert torch.equal(recorder.output("0", output), model[0](inputs))
    assert torch.equal(recorder.output("0", {"loss": one.sum()}), model[0](INPUTS))


def test_what_a_later_pass_returned_is_kept_for_its_own_loss(model, recorder):
    expected = model[0](INPUTS + 1)
    recorder.start()
    one, two = model(INPUTS), model(INPUTS + 1)
    recorder.output("0", one)
    recorder.clear()
    assert torch.equal(recorder.output("0", two), expected)
    recorder.clear()
    with pytest.raises(ConfigError, match="was not called"):
        recorder.output("0", two)


def test_a_layer_that_is_called_twice_in_a_pass_leaves_its_last_output():
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    recorder = Recorder(model, ["0"], ModelHooks(), where="student")
    recorder.start()
    first, second = model(INPUTS), model(INPUTS + 1)
    assert recorder.output("0", first) is first
    assert recorder.output("0", second) is second


def test_clearing_lets_go_and_stays_on(model, recorder):
    recorder.start()
    model(INPUTS)
    recorder.clear()
    with pytest.raises(ConfigError, match="was not called"):
        recorder.output("0")
    model(INPUTS)
    recorder.output("0")


def test_bytes_count_each_tensor_once():
    class Twice(nn.Module):
        def forward(self, input):
            return input, {"again": input}

    model = nn.Sequential(nn.Linear(6, 4), Twice())
    recorder = Recorder(model, ["0", "1"], ModelHooks(), where="student")
    recorder.start()
    model(INPUTS)
    assert recorder.bytes() == 4 * 4 * 4
    recorder.clear()
    assert recorder.bytes() == 0


def test_a_deep_copy_records_nothing(model, recorder):
    recorder.start()
    output = model(INPUTS)
    copied = copy.deepcopy(model)
    copied(INPUTS + 1)
    assert recorder.output("2") is output


def test_a_layer_that_changes_its_class_is_still_watched(model, recorder):
    class Other(nn.Linear):
        pass

    model[2].__class__ = Other
    recorder.start()
    output = model(INPUTS)
    assert recorder.output("2") is output


def test_removed_hooks_record_nothing(model, hooks, recorder):
    hooks.remove_all()
    recorder.start()
    model(INPUTS)
    with pytest.raises(ConfigError, match="was not called"):
        recorder.output("0")
    assert not any(module._forward_hooks for module in model.modules())


def test_managers_that_were_dropped_leave_nothing_on_their_teacher():
    teacher = toys.mlp()
    criterion = IntermediateLayersKnowledgeDistillationLossConfig(["2"])
    gone = []
    for _ in range(3):
        manager = begin(prepare_compression(toys.mlp(), [DistillationConfig(teacher, criterion)]))
        manager.model(INPUTS)
        gone.append(weakref.ref(manager))
    assert teacher[2]._forward_hooks  # of the last one at least; garbage is collected at any time
    del manager
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert not teacher[2]._forward_hooks
