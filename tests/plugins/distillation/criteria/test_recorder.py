"""Keeping the outputs of layers: when, of which call, and for whom."""

import copy

import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError
from compression_manager.model_hooks import ModelHooks
from compression_plugins.distillation.criteria.recorder import Recorder

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
