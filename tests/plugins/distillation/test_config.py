"""Options of the plugin: what is valid, from Python and from a recipe."""

import copy

import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError, prepare_compression
from compression_plugins import DistillationConfig, KnowledgeDistillationLossConfig

CRITERION = "KnowledgeDistillationLossConfig"
TEACHER = nn.Linear(2, 2)


def test_defaults_are_neural_compressors():
    criterion = KnowledgeDistillationLossConfig()
    assert criterion.temperature == 1.0
    assert criterion.loss_types == ("CE", "CE")
    assert criterion.loss_weights == (0.5, 0.5)
    assert DistillationConfig(TEACHER).criterion == criterion


def test_positional_order_of_the_options():
    criterion = KnowledgeDistillationLossConfig(2, ["CE", "KL"], [0.1, 0.9])
    assert (criterion.temperature, criterion.loss_types) == (2, ("CE", "KL"))
    assert criterion.loss_weights == (0.1, 0.9)
    assert DistillationConfig(TEACHER, criterion).criterion is criterion


@pytest.mark.parametrize("weights", [(0, 1), [1.0, 0.0], (0, 0), (2.5, 100)])
def test_weights_of_zero_and_above_one_are_valid(weights):
    assert KnowledgeDistillationLossConfig(loss_weights=weights).loss_weights == tuple(weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"temperature": -1.0}, "temperature must be a finite number above 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number above 0"),
        ({"temperature": float("inf")}, "temperature must be a finite number above 0"),
        ({"temperature": True}, "temperature must be a finite number above 0"),
        ({"temperature": "4"}, "temperature must be a finite number above 0"),
        ({"temperature": None}, "temperature must be a finite number above 0"),
        ({"loss_types": "CE"}, "loss_types must be a list of two entries, got 'CE'"),
        ({"loss_types": ["CE"]}, "loss_types must be a list of two entries"),
        ({"loss_types": ["CE", "KL", "KL"]}, "loss_types must be a list of two entries"),
        ({"loss_types": None}, "loss_types must be a list of two entries"),
        ({"loss_types": {"CE": 1, "KL": 2}}, "loss_types must be a list of two entries"),
        ({"loss_types": ["KLD", "CE"]}, r"loss_types\[0\] got 'KLD'; did you mean 'KL'\?"),
        ({"loss_types": ["CE", 3]}, r"loss_types\[1\] must be of type str, got 3"),
        ({"loss_weights": 0.5}, "loss_weights must be a list of two entries, got 0.5"),
        ({"loss_weights": [0.5]}, "loss_weights must be a list of two entries"),
        ({"loss_weights": [-0.5, 1]}, r"loss_weights\[0\] must be a finite number of at least 0"),
        ({"loss_weights": [0.5, "a"]}, r"loss_weights\[1\] must be a finite number of at least 0"),
        ({"loss_weights": [0.5, True]}, r"loss_weights\[1\] must be a finite number of at least 0"),
        (
            {"loss_weights": [float("inf"), 1]},
            r"loss_weights\[0\] must be a finite number of at least 0",
        ),
        ({"loss_options": ["a"]}, "loss_options must be of type Mapping"),
        ({"loss_options": {"temperature": 2}}, f"use {CRITERION}.temperature"),
    ],
)
def test_bad_criterion(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        KnowledgeDistillationLossConfig(**options)
    assert str(caught.value).startswith(CRITERION)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "teacher_model is missing.*teacher_outputs='caller'"),
        ({"teacher_model": lambda x: x}, "teacher_model must be of type Module or None"),
        ({"teacher_model": nn.Linear}, "teacher_model must be of type Module or None"),
        ({"teacher_model": TEACHER, "criterion": {"temperature": 4}}, f"criterion .*{CRITERION}"),
        ({"teacher_model": TEACHER, "criterion": None}, f"criterion .*{CRITERION}"),
        ({"teacher_outputs": "callers"}, "teacher_outputs got 'callers'; did you mean 'caller'"),
        ({"teacher_model": TEACHER, "teacher_outputs": "caller"}, "teacher_model has no use"),
        (
            {"teacher_forward": lambda model, inputs: None, "teacher_outputs": "caller"},
            "teacher_forward has no use",
        ),
        ({"teacher_model": TEACHER, "teacher_forward": "eval"}, "teacher_forward must be a func"),
        ({"teacher_model": TEACHER, "output": 1.5}, "output must be a key, an index or None"),
        ({"teacher_model": TEACHER, "output": True}, "output must be a key, an index or None"),
        ({"teacher_model": TEACHER, "teacher_output": ["logits"]}, "teacher_output must be a key"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=f"DistillationConfig.{message}"):
        DistillationConfig(**options)


# Recipes -----------------------------------------------------------------------------------------


def write(tmp_path, *lines):
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(["plugins:", "  distillation:", *(f"    {item}" for item in lines)]))
    return path


def test_recipe_and_python_give_the_same_configuration(tmp_path):
    path = write(
        tmp_path,
        "criterion:",
        "  type: knowledge_distillation",
        "  temperature: 4",
        "  loss_types: [CE, KL]",
        "  loss_weights: [0.25, 0.75]",
        "output: 0",
    )
    teacher = toys.mlp()
    from_recipe = prepare_compression(toys.mlp(), path, teacher_model=teacher)
    criterion = KnowledgeDistillationLossConfig(4.0, ("CE", "KL"), (0.25, 0.75))
    config = DistillationConfig(teacher, criterion, output=0, name="distillation")
    from_python = prepare_compression(toys.mlp(), [config])
    assert from_recipe.state_dict()["recipe"] == from_python.state_dict()["recipe"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["criterion: {temperature: 0}"],
            r"criterion: .*temperature must be a finite number above 0",
        ),
        (["criterion: {temperature: warm}"], r"criterion\.temperature: expected float"),
        (["criterion: {temprature: 4}"], r"criterion\.temprature: .*did you mean 'temperature'"),
        (["criterion: {type: knowledge}"], r"criterion\.type: .*did you mean 'knowledge_dist"),
        (["criterion: {loss_types: [CE]}"], r"criterion\.loss_types: expected a list of 2"),
        (["criterion: {loss_types: CE}"], r"criterion\.loss_types: expected a list"),
        (["criterion: {loss_types: [LK, CE]}"], r"loss_types\[0\] got 'LK'; did you mean 'KL'"),
        (["criterion: {loss_types: [CE, LK]}"], r"loss 'LK'; did you mean .*'KL'\? Valid: CE, DIS"),
        (["criterion: {loss_weights: [1, 2, 3]}"], r"criterion\.loss_weights: expected a list of"),
        (["criterion: {loss_weights: [-1, 2]}"], r"criterion: .*loss_weights\[0\] must be a finit"),
        (["criterion: {loss_options: {beta: 2}}"], "'CE' has no option 'beta'"),
        (["output: [a]"], r"output: expected str or int or null"),
        (["teacher_outputs: calller"], r"teacher_outputs: .*did you mean 'caller'"),
        (["teacher_model: bert"], r"teacher_model is a live object"),
    ],
)
def test_bad_recipes(tmp_path, lines, message):
    path, model = write(tmp_path, *lines), toys.mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        prepare_compression(model, path, teacher_model=toys.mlp())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_recipe_without_a_teacher_says_how_to_pass_it(tmp_path):
    with pytest.raises(ConfigError, match=r"prepare_compression\(\.\.\., teacher_model=teacher\)"):
        prepare_compression(toys.mlp(), write(tmp_path, "output: 0"))


def test_recipe_for_teacher_outputs_of_the_caller(tmp_path):
    manager = prepare_compression(toys.mlp(), write(tmp_path, "teacher_outputs: caller"))
    assert manager.state_dict()["recipe"]["plugins"]["distillation"]["teacher_outputs"] == "caller"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_types": ("CE", "LK")}, r"distillation loss 'LK'; did you mean .*'KL'\?"),
        ({"loss_options": {"temprature": 1}}, "'CE' has no option 'temprature'; did you mean 'tem"),
    ],
)
def test_losses_are_looked_up_at_prepare(options, message):
    teacher = toys.mlp().train()
    config = DistillationConfig(teacher, KnowledgeDistillationLossConfig(**options))
    with pytest.raises(ConfigError, match=message):
        prepare_compression(toys.mlp(), [config])
    assert all(module.training for module in teacher.modules())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
