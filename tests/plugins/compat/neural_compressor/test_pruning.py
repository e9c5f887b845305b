"""`WeightPruningConfig` is a config of the plugin that is installed as `magnitude_pruning`."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import ConfigError
from compression_manager.plugin_host.discovery import ENTRY_POINT_GROUP
from compression_plugins.compat.neural_compressor import (
    DistillationConfig,
    QuantizationAwareTrainingConfig,
    WeightPruningConfig,
    load,
    prepare_compression,
)

SOURCES = Path(__file__).parents[4] / "examples" / "third_party_plugin" / "src"
IMAGES, LABELS = toys.images(16).tensors


@pytest.fixture
def _installed(tmp_path, monkeypatch):
    """The example's plugin, as if its distribution were installed."""
    folder = tmp_path / "site" / "pruning-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: pruning\nVersion: 1.0\n")
    plugin = "compression_magnitude_pruning:MagnitudePruningPlugin"
    entry = f"[{ENTRY_POINT_GROUP}]\nmagnitude_pruning = {plugin}\n"
    (folder / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(SOURCES)
    monkeypatch.syspath_prepend(tmp_path / "site")
    torch.manual_seed(0)


def like_the_plugin(**options):
    """A config that asks for nothing but what the plugin does."""
    options = {"pruning_type": "magnitude", "pattern": "1x1", **options}
    return WeightPruningConfig(**options)


def prepared(conf, model=None):
    """Return the plugin's configs that a manager was made from."""
    manager = prepare_compression(model or toys.ConvNet(), conf)
    nodes = manager.native.state_dict()["recipe"]["plugins"]
    manager.close()
    return nodes


def share_of_zeros(model):
    weights = torch.cat([model.conv1.weight.flatten(), model.conv2.weight.flatten()])
    return (weights == 0).float().mean().item()


def train(manager, steps=3):
    optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.05, momentum=0.9)
    manager.on_train_begin()
    for step in range(steps):
        manager.on_step_begin(step)
        output = manager.model(IMAGES)
        loss = manager.on_after_compute_loss(IMAGES, output, F.cross_entropy(output, LABELS))
        optimizer.zero_grad()
        loss.backward()
        manager.on_before_optimizer_step()
        optimizer.step()
        manager.on_step_end()


def test_without_the_plugin_the_error_says_what_to_install():
    with pytest.raises(ConfigError, match="install the distribution compression-magnitude-pruning"):
        prepare_compression(toys.ConvNet(), WeightPruningConfig())


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"sparsity": 0.9, "scope": "global", "every": 1, "end": None}),
        ({"target_sparsity": 0.6}, {"sparsity": 0.6}),
        ({"pruning_scope": "local"}, {"scope": "layer"}),
        ({"pruning_frequency": 5}, {"every": 5}),
        ({"start_step": 2}, {"start": {"step": 2, "epoch": None}, "end": None}),
        (
            {"start_step": 2, "end_step": 9, "sparsity_decay_type": "cube"},
            {"end": {"step": 9, "epoch": None}},
        ),
        ({}, {"include": ["conv1.weight", "conv2.weight"]}),  # never the classifier's layer
        ({"op_names": ["conv1"]}, {"include": ["conv1.weight"]}),
        ({"op_names": ["1$", "2"]}, {"include": ["conv1.weight", "conv2.weight"]}),
        ({"excluded_op_names": ["v1"]}, {"include": ["conv2.weight"]}),
        ({"pruning_op_types": ["Conv", "Batch"]}, {"include": ["conv1.weight", "conv2.weight"]}),
    ],
)
def test_fields_of_the_plugin(options, expected):
    node = prepared(like_the_plugin(**options))["magnitude_pruning"]
    assert {name: node[name] for name in expected} == expected


@pytest.mark.usefixtures("_installed")
def test_each_local_dictionary_is_an_instance_of_its_own():
    locals_ = [
        {"op_names": ["conv1"], "target_sparsity": 0.3},
        {"op_names": ["conv2"], "pruning_scope": "local"},
    ]
    nodes = prepared(like_the_plugin(pruning_configs=locals_, target_sparsity=0.8))
    first, second = nodes["magnitude_pruning"], nodes["magnitude_pruning_2"]
    assert (first["include"], first["sparsity"], first["scope"]) == (
        ["conv1.weight"],
        0.3,
        "global",
    )
    assert (second["include"], second["sparsity"], second["scope"]) == (
        ["conv2.weight"],
        0.8,
        "layer",
    )


@pytest.mark.usefixtures("_installed")
def test_a_model_that_does_not_end_in_its_classifier_is_pruned_everywhere():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.ReLU())
    node = prepared(like_the_plugin(), model)["magnitude_pruning"]
    assert node["include"] == ["0.weight", "1.weight"]
    dropped = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.Dropout())
    assert prepared(like_the_plugin(), dropped)["magnitude_pruning"]["include"] == ["0.weight"]


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({}, []),
        ({"pruning_type": "snip"}, ["pruning_type='snip'"]),
        ({"pattern": "2:4"}, ["pattern='2:4'"]),
        ({"end_step": 5}, ["sparsity_decay_type='exp'"]),
        ({"backend": "itex"}, ["backend has no meaning"]),
        ({"min_sparsity_ratio_per_op": 0.1}, ["min_sparsity_ratio_per_op has no meaning"]),
        ({"max_sparsity_ratio_per_op": 0.5}, ["max_sparsity_ratio_per_op has no meaning"]),
        ({"low_memory_usage": True}, ["low_memory_usage has no meaning"]),
        ({"reg_type": "group_lasso"}, ["'reg_type' is no field"]),
        ({"pruning_configs": [{"reg_type": 1}]}, ["'reg_type' is no field"]),
        ({"pruning_configs": [{"pattern": "4x1"}, {"pattern": "4x1"}]}, ["pattern='4x1'"]),
    ],
)
def test_what_the_plugin_does_not_do_warns_once(options, messages):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared(like_the_plugin(**options))
    assert len(caught) == len(messages)
    for warning, message in zip(caught, messages, strict=True):
        assert message in str(warning.message)
        assert warning.filename == __file__


@pytest.mark.usefixtures("_installed")
def test_the_defaults_of_2_6_warn_because_the_plugin_prunes_otherwise():
    with pytest.warns(UserWarning, match="snip_momentum"), pytest.warns(UserWarning, match="4x1"):
        prepared(WeightPruningConfig())


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_scope": "globl"}, "'global'"),
        ({"op_names": ["nothing"]}, "prunes nothing"),
        ({"op_names": ["fc"]}, "prunes nothing"),
    ],
)
def test_wrong_values_are_config_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        prepared(like_the_plugin(**options))


@pytest.mark.usefixtures("_installed")
def test_positional_arguments_have_the_order_of_2_6():
    conf = WeightPruningConfig([{}], 0.7, "magnitude", "1x1", ["conv2"], further=3)
    assert (conf.target_sparsity, conf.op_names, conf.further) == (0.7, ["conv2"], {"further": 3})


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("order", [1, -1])
def test_pruning_and_quantization_in_either_order(tmp_path, order):
    confs = [like_the_plugin(target_sparsity=0.75), QuantizationAwareTrainingConfig()][::order]
    manager = prepare_compression(toys.ConvNet(), confs)
    train(manager)
    manager.on_train_end()
    assert share_of_zeros(manager.model.model) >= 0.75
    manager.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", toys.ConvNet())(IMAGES), manager.model(IMAGES))


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("announces", [False, True])
def test_weights_stay_zero_whether_or_not_the_loop_announces_the_update(announces):
    manager = prepare_compression(
        toys.ConvNet(), [DistillationConfig(toys.ConvNet()), like_the_plugin()]
    )
    if announces:
        train(manager)
    else:
        optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.05, momentum=0.9)
        manager.on_train_begin()
        for step in range(3):
            manager.on_step_begin(step)
            output = manager.model(IMAGES)
            task = F.cross_entropy(output, LABELS)
            manager.on_after_compute_loss(IMAGES, output, task).backward()
            optimizer.step()
            manager.on_after_optimizer_step()
    assert share_of_zeros(manager.model.model) == pytest.approx(0.9, abs=0.01)
    manager.on_train_end()
    assert share_of_zeros(manager.model.model) == pytest.approx(0.9, abs=0.01)
