"""Every field of Neural Compressor 2.6 is here, with its default, and is used or warned about."""

import inspect
import warnings
from dataclasses import fields

import pytest
from torch import nn

import toys
from compression_manager import ConfigError
from compression_plugins.compat.neural_compressor import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    QuantizationAwareTrainingConfig,
    SelfKnowledgeDistillationLossConfig,
    WeightPruningConfig,
    prepare_compression,
)
from compression_plugins.compat.neural_compressor.fields import describe_fields

# From the signatures of neural_compressor/config.py of the wheel of version 2.6. The criteria of
# tuning are objects there, and the criterion of DistillationConfig a shared one.
FIELDS = {
    KnowledgeDistillationLossConfig: {
        "temperature": 1.0,
        "loss_types": ["CE", "CE"],
        "loss_weights": [0.5, 0.5],
    },
    IntermediateLayersKnowledgeDistillationLossConfig: {
        "layer_mappings": [],
        "loss_types": [],
        "loss_weights": [],
        "add_origin_loss": False,
    },
    SelfKnowledgeDistillationLossConfig: {
        "layer_mappings": [],
        "temperature": 1.0,
        "loss_types": [],
        "loss_weights": [],
        "add_origin_loss": False,
    },
    DistillationConfig: {
        "teacher_model": None,
        "criterion": KnowledgeDistillationLossConfig(),
        "optimizer": {"SGD": {"learning_rate": 0.0001}},
    },
    QuantizationAwareTrainingConfig: {
        "device": "cpu",
        "backend": "default",
        "inputs": [],
        "outputs": [],
        "op_type_dict": None,
        "op_name_dict": None,
        "reduce_range": None,
        "model_name": "",
        "quant_format": "default",
        "excluded_precisions": [],
        "quant_level": "auto",
        "accuracy_criterion": None,
        "tuning_criterion": None,
    },
    WeightPruningConfig: {
        "pruning_configs": [{}],
        "target_sparsity": 0.9,
        "pruning_type": "snip_momentum",
        "pattern": "4x1",
        "op_names": [],
        "excluded_op_names": [],
        "backend": None,
        "start_step": 0,
        "end_step": 0,
        "pruning_scope": "global",
        "pruning_frequency": 1,
        "min_sparsity_ratio_per_op": 0.0,
        "max_sparsity_ratio_per_op": 0.98,
        "sparsity_decay_type": "exp",
        "pruning_op_types": ["Conv", "Linear"],
        "low_memory_usage": False,
    },
}

# A value that is not the default one, of every field without a meaning here.
IGNORED = {
    (DistillationConfig, "optimizer"): {"Adam": {}},
    (QuantizationAwareTrainingConfig, "device"): "gpu",
    (QuantizationAwareTrainingConfig, "backend"): "ipex",
    (QuantizationAwareTrainingConfig, "inputs"): ["input"],
    (QuantizationAwareTrainingConfig, "outputs"): ["output"],
    (QuantizationAwareTrainingConfig, "model_name"): "bert",
    (QuantizationAwareTrainingConfig, "quant_format"): "QDQ",
    (QuantizationAwareTrainingConfig, "excluded_precisions"): ["bf16"],
    (QuantizationAwareTrainingConfig, "quant_level"): 1,
    (QuantizationAwareTrainingConfig, "accuracy_criterion"): object(),
    (QuantizationAwareTrainingConfig, "tuning_criterion"): object(),
    (WeightPruningConfig, "backend"): "itex",
    (WeightPruningConfig, "min_sparsity_ratio_per_op"): 0.1,
    (WeightPruningConfig, "max_sparsity_ratio_per_op"): 0.5,
    (WeightPruningConfig, "low_memory_usage"): True,
}


@pytest.mark.parametrize("config_class", FIELDS)
def test_names_order_and_defaults_are_those_of_2_6(config_class):
    config = config_class()
    assert {item.name: getattr(config, item.name) for item in fields(config)} == FIELDS[
        config_class
    ]
    assert [item.name for item in fields(config)] == list(FIELDS[config_class])


@pytest.mark.parametrize("config_class", FIELDS)
def test_defaults_are_not_shared(config_class):
    first, second = config_class(), config_class()
    for item in fields(first):
        value = getattr(first, item.name)
        if isinstance(value, (list, dict)) or item.name == "criterion":
            assert value is not getattr(second, item.name), item.name


@pytest.mark.parametrize("config_class", FIELDS)
def test_every_field_says_what_becomes_of_it(config_class):
    described = describe_fields(config_class)
    assert [item.name for item in described] == list(FIELDS[config_class])
    assert all(item.text for item in described)
    ignored = {name for owner, name in IGNORED if owner is config_class}
    assert {item.name for item in described if not item.is_used} == ignored


@pytest.mark.parametrize(
    ("config_class", "name"), [key for key in IGNORED if key[0] is not WeightPruningConfig]
)
def test_a_field_without_meaning_warns_once_and_says_why(config_class, name):
    options = {name: IGNORED[config_class, name]}
    if config_class is DistillationConfig:
        options["teacher_model"] = toys.mlp()
    config = config_class(**options)
    (reason,) = [item.text for item in describe_fields(config_class) if item.name == name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager = prepare_compression(toys.mlp(), config)
    manager.close()
    (warning,) = caught
    assert f"{config_class.__name__}.{name} has no meaning here" in str(warning.message)
    assert reason in str(warning.message)
    assert warning.filename == __file__


def test_arguments_that_2_6_ignores_warn():
    with pytest.warns(UserWarning, match="no argument 'options', as in 2.6"):
        prepare_compression(toys.mlp(), QuantizationAwareTrainingConfig(), options=None).close()


def test_fields_are_read_and_set_through_config_as_in_2_6():
    criterion = IntermediateLayersKnowledgeDistillationLossConfig([["0"], [["2", ""], ["2", ""]]])

    def whole(output):
        return output

    inner = criterion.config.IntermediateLayersKnowledgeDistillationLoss
    inner.layer_mappings[1][1][-1] = whole
    inner.add_origin_loss = True
    assert criterion.layer_mappings[1][1] == ["2", whole]
    assert criterion.add_origin_loss


@pytest.mark.parametrize("confs", [[], [object()], None, [[QuantizationAwareTrainingConfig()]]])
def test_anything_but_configs_is_refused(confs):
    with pytest.raises(ConfigError):
        prepare_compression(toys.mlp(), confs)


def test_prepare_takes_its_arguments_by_2_6_names():
    assert list(inspect.signature(prepare_compression).parameters)[:2] == ["model", "confs"]
    manager = prepare_compression(model=toys.mlp(), confs=QuantizationAwareTrainingConfig())
    assert isinstance(manager.model, nn.Module)
    manager.close()


def test_a_refused_config_leaves_the_model_as_it_was():
    model = toys.mlp()
    with pytest.raises(ConfigError, match="matches no layer"):
        prepare_compression(
            model,
            QuantizationAwareTrainingConfig(op_name_dict={"9": {"weight": {"dtype": ["fp32"]}}}),
        )
    assert type(model[0]) is nn.Linear
