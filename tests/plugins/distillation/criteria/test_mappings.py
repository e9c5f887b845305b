"""What `layer_mappings` may look like, and which layers it means."""

import pytest
from torch import nn

import toys
from compression_manager import ConfigError, prepare_compression
from compression_plugins import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
)
from compression_plugins.distillation.criteria.mappings import (
    LayerMapping,
    TapPoint,
    expand,
    parse_mapping,
)


def first(output):
    return output[0]


@pytest.mark.parametrize(
    ("item", "student", "teacher"),
    [
        ("conv1", TapPoint("conv1"), TapPoint("conv1")),
        (["conv1"], TapPoint("conv1"), TapPoint("conv1")),
        (["conv1", "layer.3"], TapPoint("conv1"), TapPoint("layer.3")),
        (
            [["conv1", 0], ["layer.3", "hidden"]],
            TapPoint("conv1", 0),
            TapPoint("layer.3", "hidden"),
        ),
        ([["conv1"], "layer.3"], TapPoint("conv1"), TapPoint("layer.3")),
        ([["conv1", first]], TapPoint("conv1", first), TapPoint("conv1", first)),
        (["", ""], TapPoint(""), TapPoint("")),
    ],
)
def test_forms(item, student, teacher):
    assert parse_mapping("here", item) == LayerMapping(student, teacher)


@pytest.mark.parametrize(
    "item",
    [
        3,
        None,
        [],
        ["a", "b", "c"],
        [["a", True], "b"],
        [["a", 1.5], "b"],
        [[1], "b"],
        [["a", 0, 1]],
    ],
)
def test_other_forms_are_refused_with_the_valid_ones(item):
    with pytest.raises(ConfigError, match=r"here: .* is no layer mapping; valid are a name"):
        parse_mapping("here", item)


def blocks(count, width):
    layers = [
        nn.Sequential(nn.Linear(6 if i == 0 else width, width), nn.ReLU()) for i in range(count)
    ]
    return nn.ModuleDict({"blocks": nn.ModuleList(layers), "head": nn.Linear(width, 4)})


def test_globs_pair_layers_in_the_order_of_the_models():
    student, teacher = blocks(2, 3), blocks(4, 5)
    mapping = parse_mapping("here", [["blocks.*", 0], "blocks.[13]"])
    assert expand(mapping, student, teacher) == [
        LayerMapping(TapPoint("blocks.0", 0), TapPoint("blocks.1")),
        LayerMapping(TapPoint("blocks.1", 0), TapPoint("blocks.3")),
    ]
    deeper = expand(parse_mapping("here", ["blocks.*.0", "blocks.[02].0"]), student, teacher)
    assert [str(item.student) for item in deeper] == ["'blocks.0.0'", "'blocks.1.0'"]


def test_unequal_numbers_of_matches_are_refused():
    with pytest.raises(
        ConfigError, match=r"matches 2 layers of the student \(blocks.0, blocks.1\)"
    ):
        expand(parse_mapping("here", "blocks.*"), blocks(2, 3), blocks(4, 5))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            ["conv3", "conv1"],
            r"the student has no layer 'conv3'; did you mean 'conv2' or 'conv1'\?",
        ),
        (["conv1", "conf1"], r"the teacher has no layer 'conf1'; did you mean 'conv1'"),
        (["conv*", "fc.*"], r"the teacher has no layer 'fc\.\*'"),
    ],
)
def test_a_layer_that_does_not_exist_is_found_at_prepare(mapping, message):
    criterion = IntermediateLayersKnowledgeDistillationLossConfig(["conv1", mapping])
    with pytest.raises(ConfigError, match=rf"criterion\.layer_mappings\[1\]: {message}"):
        prepare_compression(toys.ConvNet(), [DistillationConfig(toys.ConvNet(), criterion)])


CRITERION = IntermediateLayersKnowledgeDistillationLossConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_mappings": []}, "layer_mappings must be a list with at least one item"),
        ({"layer_mappings": "conv1"}, "layer_mappings must be a list with at least one item"),
        ({"layer_mappings": ["a", 3]}, r"layer_mappings\[1\]: 3 is no layer mapping"),
        ({"layer_mappings": ["a"], "loss_types": ["MSE", "L1"]}, "loss_types has 2 entries for 1"),
        ({"layer_mappings": ["a"], "loss_types": 3}, "loss_types must be of type str, got 3"),
        ({"layer_mappings": ["a", "b"], "loss_weights": [1.0]}, "loss_weights has 1 entries for 2"),
        ({"layer_mappings": ["a"], "loss_weights": -1}, "loss_weights must be a finite number of"),
        ({"layer_mappings": ["a"], "add_origin_loss": 1}, "add_origin_loss must be of type bool"),
        ({"layer_mappings": ["a"], "projection": "atuo"}, "projection got 'atuo'; did you mean 'a"),
        ({"layer_mappings": ["a"], "loss_options": {"temperature": 2}}, "holds 'temperature'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=f"IntermediateLayers.*{message}"):
        CRITERION(**options)


def test_from_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "plugins:\n  distillation:\n    criterion:\n      type: intermediate_layers\n"
        "      layer_mappings: [conv1, [[conv2], [conv2]], ['', '']]\n"
        "      loss_types: [attention_transfer, MSE, KL]\n      loss_weights: 2\n"
    )
    manager = prepare_compression(toys.ConvNet(), recipe, teacher_model=toys.ConvNet(6))
    criterion = manager._plugins[0].config.criterion
    assert criterion == CRITERION(
        ["conv1", [["conv2"], ["conv2"]], ["", ""]],
        ["attention_transfer", "MSE", "KL"],
        2,
    )
