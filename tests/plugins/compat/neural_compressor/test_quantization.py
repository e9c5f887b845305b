"""Quantization-aware training under Neural Compressor's names, and the int8 model it ends in."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import CheckpointError, CheckpointMismatchError, ConfigError, deploy
from compression_plugins.compat.neural_compressor import (
    CompressedModel,
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    QuantizationAwareTrainingConfig,
    load,
    prepare_compression,
)
from compression_plugins.compat.neural_compressor.utils import pytorch

IMAGES, LABELS = toys.images(16).tensors
FLOAT = {"weight": {"dtype": ["fp32"]}, "activation": {"dtype": ["fp32"]}}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(confs, student=None, steps=3):
    manager = prepare_compression(student or toys.ConvNet(), confs)
    optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.05)
    manager.callbacks.on_train_begin()
    for step in range(steps):
        manager.callbacks.on_step_begin(step)
        output = manager.model(IMAGES)
        loss = F.cross_entropy(output, LABELS)
        loss = manager.callbacks.on_after_compute_loss(IMAGES, output, loss)
        optimizer.zero_grad()
        loss.backward()
        manager.callbacks.on_before_optimizer_step()
        optimizer.step()
        manager.callbacks.on_step_end()
    return manager


def classes(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


# The model ----------------------------------------------------------------------------------------


def test_quantization_alone_returns_the_loss_it_was_given():
    manager = prepare_compression(toys.ConvNet(), QuantizationAwareTrainingConfig())
    manager.on_train_begin()
    manager.on_step_begin(0)
    loss = torch.tensor(1.5)
    assert manager.on_after_compute_loss(IMAGES, manager.model(IMAGES), loss).item() == 1.5
    manager.close()


def test_the_first_step_is_quantized_already():
    student = toys.ConvNet().eval()
    expected = student(IMAGES)
    manager = prepare_compression(student, QuantizationAwareTrainingConfig())
    manager.on_train_begin()
    manager.on_step_begin(0)
    student.train()
    student.bn1.eval(), student.bn2.eval()
    assert not torch.equal(manager.model(IMAGES), expected)
    manager.close()


def test_the_model_is_int8_where_it_stands_after_training():
    student = toys.ConvNet()
    manager = trained(QuantizationAwareTrainingConfig(), student)
    model = manager.model
    assert model.model is student
    manager.callbacks.on_train_end()
    assert manager.model is model
    assert not model.training
    found = classes(model)
    assert found["_model.conv1"] == found["_model.conv2"] == "ConvertedConv"
    assert found["_model.fc"] == "ConvertedLinear"
    assert model.model.conv1.integer_weight().dtype == torch.int8
    assert type(student.conv1) is nn.Conv2d  # the model that was given is a float model again


def test_names_and_attributes_are_those_of_the_model():
    student = toys.ConvNet()
    names = [name for name, _ in student.named_parameters()]
    manager = prepare_compression(student, DistillationConfig(toys.ConvNet()))
    model = manager.model
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_parameters(prefix="x")] == [f"x.{n}" for n in names]
    assert [name for name, _ in model.named_buffers()] == [n for n, _ in student.named_buffers()]
    assert list(model.state_dict()) == list(student.state_dict())
    assert model.fc is student.fc
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing
    manager.close()


def test_state_goes_between_the_model_and_its_wrapper():
    manager = prepare_compression(toys.ConvNet(), DistillationConfig(toys.ConvNet()))
    model = manager.model
    model.extra = nn.Linear(2, 2)  # a layer that a loop adds
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert {"extra.weight", "fc.weight"} <= state.keys()
    fresh = toys.ConvNet()
    fresh.load_state_dict({name: state[name] for name in fresh.state_dict()})
    model.model.load_state_dict(fresh.state_dict())
    outer = nn.ModuleDict({"inner": model})
    outer.load_state_dict(outer.state_dict())
    assert "inner.fc.weight" in outer.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    manager.close()


def test_a_wrapped_model_is_prepared_as_what_it_wraps():
    first = trained(DistillationConfig(toys.ConvNet()))
    first.on_train_end()
    student = first.model.model
    second = prepare_compression(first.model, QuantizationAwareTrainingConfig())
    assert isinstance(second.model, CompressedModel)
    assert second.model.model is student
    second.close()


# Saving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saves", ["manager", "model"])
def test_the_int8_model_is_the_same_after_loading(tmp_path, saves):
    manager = trained(QuantizationAwareTrainingConfig())
    manager.callbacks.on_train_end()
    folder = (manager if saves == "manager" else manager.model).save(tmp_path / "saved")
    loaded = load(folder, toys.ConvNet())
    assert torch.equal(loaded(IMAGES), manager.model(IMAGES))
    assert list(loaded.state_dict()) == list(manager.model.state_dict())
    assert torch.equal(deploy.load(folder, toys.ConvNet())(IMAGES), loaded(IMAGES))
    assert not any(path.suffix in (".pt", ".pth", ".pkl") for path in folder.iterdir())


@pytest.mark.parametrize("ends", [False, True])
def test_a_float_model_is_the_same_after_loading(tmp_path, ends):
    manager = trained(DistillationConfig(toys.ConvNet()))
    if ends:
        manager.on_train_end()
    manager.save(str(tmp_path / "saved"))
    loaded = pytorch.load(str(tmp_path / "saved"), toys.ConvNet(), dataloader=None)
    assert torch.equal(loaded(IMAGES), manager.model.eval()(IMAGES))
    manager.close()


def test_saving_during_training_writes_the_present_int8_model(tmp_path):
    manager = trained(QuantizationAwareTrainingConfig())
    manager.model.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved", toys.ConvNet())
    torch.testing.assert_close(loaded(IMAGES), manager.model.eval()(IMAGES))
    before = loaded(IMAGES)
    with torch.no_grad():
        manager.model.fc.bias += 1
    manager.model.save(tmp_path / "saved")
    assert not torch.equal(load(tmp_path / "saved", toys.ConvNet())(IMAGES), before)
    manager.close()


def test_tied_weights_are_saved_once(tmp_path):
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    student[1].weight = student[0].weight
    manager = prepare_compression(student, DistillationConfig(nn.Linear(4, 4)))
    manager.save(tmp_path / "saved")
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fresh[1].weight = fresh[0].weight
    load(tmp_path / "saved", fresh)
    assert torch.equal(fresh[1].weight, student[0].weight)
    assert torch.equal(fresh[1].bias, student[1].bias)
    manager.close()


def test_saving_without_a_name_goes_to_the_workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manager = trained(QuantizationAwareTrainingConfig())
    manager.on_train_end()
    manager.save()
    assert torch.equal(load("nc_workspace", toys.ConvNet())(IMAGES), manager.model(IMAGES))


@pytest.mark.parametrize("conf", [QuantizationAwareTrainingConfig(), None])
def test_another_architecture_is_refused_and_left_alone(tmp_path, conf):
    manager = trained(conf or DistillationConfig(toys.ConvNet()))
    manager.on_train_end()
    manager.save(tmp_path / "saved")
    other = toys.ConvNet(width=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointMismatchError):
        load(tmp_path / "saved", other)
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in before)


def test_a_model_with_more_than_was_saved_is_refused_and_left_alone(tmp_path):
    manager = trained(DistillationConfig(toys.ConvNet()))
    manager.save(tmp_path / "saved")
    manager.close()
    other = toys.ConvNet()
    other.extra = nn.Linear(2, 2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        CheckpointMismatchError, match=r"nothing for 'extra\.weight', 'extra\.bias'"
    ):
        load(tmp_path / "saved", other)
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in before)


def test_pickles_of_2_6_are_not_read(tmp_path):
    (tmp_path / "best_model.pt").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="pickles are not read"):
        load(tmp_path, toys.ConvNet())


@pytest.mark.parametrize(
    "arguments", [(), ("somewhere",), ("somewhere", toys.mlp(), True), ("s", toys.mlp(), False, {})]
)
def test_what_load_does_not_offer(arguments):
    with pytest.raises(ConfigError, match="load"):
        load(*arguments)


# What stays in float ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "in_float"),
    [
        ({"op_name_dict": {"conv1": FLOAT}}, {"conv1"}),
        ({"op_name_dict": {"conv*": FLOAT}}, {"conv1", "conv2"}),
        ({"op_name_dict": {"conv2": {"weight": {"dtype": "fp32"}}}}, {"conv2"}),
        ({"op_type_dict": {"Conv2d": FLOAT}}, {"conv1", "conv2"}),
        ({"op_type_dict": {"Conv": FLOAT}}, {"conv1", "conv2"}),
        ({"op_type_dict": {"Linear": FLOAT}, "op_name_dict": {"conv1": FLOAT}}, {"fc", "conv1"}),
        ({"op_name_dict": {}}, set()),
    ],
)
def test_fp32_leaves_layers_in_float_convolutions_too(options, in_float):
    manager = trained(QuantizationAwareTrainingConfig(**options))
    manager.on_train_end()
    found = {name for name, kind in classes(manager.model.model).items() if "Converted" in kind}
    assert found == {"conv1", "conv2", "fc"} - in_float


def test_fp32_activations_alone_quantize_the_weight_only():
    parts = {"activation": {"dtype": ["fp32"]}, "weight": {"dtype": ["int8"]}}
    manager = trained(QuantizationAwareTrainingConfig(op_name_dict={"fc": parts}))
    manager.on_train_end()
    assert manager.model.model.fc.spec.input is None
    assert manager.model.model.conv1.spec.input is not None


@pytest.mark.parametrize(
    "options", [{"dtype": ["bf16"]}, {"dtype": ["int8", "fp32"]}, {"granularity": ["per_tensor"]}]
)
def test_what_the_dictionaries_cannot_choose_warns(options):
    conf = QuantizationAwareTrainingConfig(op_name_dict={"fc": {"weight": options}})
    with pytest.warns(UserWarning, match=r"op_name_dict\['fc'\]\['weight'\].* has no meaning"):
        prepare_compression(toys.ConvNet(), conf).close()


def test_reduce_range_gives_activations_seven_bits():
    manager = trained(QuantizationAwareTrainingConfig(reduce_range=True))
    manager.on_train_end()
    assert manager.model.model.fc.spec.input.bits == 7
    assert manager.model.model.fc.spec.weight.bits == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op_name_dict": {"conv3": FLOAT}}, "conv2"),
        ({"op_type_dict": {"Conv2D": FLOAT}}, "Conv2d"),
        ({"op_name_dict": ["conv1"]}, "must be a dictionary"),
        ({"op_name_dict": {"conv1": "fp32"}}, "must be a dictionary"),
        ({"op_name_dict": {"conv1": {"weights": {}}}}, "'weight' and 'activation'"),
        ({"reduce_range": 7}, "reduce_range"),
    ],
)
def test_wrong_dictionaries_are_config_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        prepare_compression(toys.ConvNet(), QuantizationAwareTrainingConfig(**options))


def test_two_quantizations_are_refused():
    confs = [QuantizationAwareTrainingConfig(), QuantizationAwareTrainingConfig()]
    with pytest.raises(ConfigError, match="fake_quant"):
        prepare_compression(toys.ConvNet(), confs)


# With distillation --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_features_of_a_convolution_that_is_folded_with_its_batch_norm(tmp_path, order):
    student, teacher = toys.ConvNet(4), toys.ConvNet(6)
    criterion = IntermediateLayersKnowledgeDistillationLossConfig(
        [["conv1"], ["bn2"]], add_origin_loss=True
    )
    confs = [DistillationConfig(teacher, criterion), QuantizationAwareTrainingConfig()][::order]
    manager = trained(confs, student)
    manager.on_train_end()
    model = manager.model
    assert classes(model.model)["bn1"] == "Identity"
    hooked = [module for module in model.modules() if module._forward_hooks]
    assert not hooked
    manager.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", toys.ConvNet(4))(IMAGES), model(IMAGES))


def test_features_are_let_go_after_each_loss():
    student, teacher = toys.ConvNet(), toys.ConvNet()
    criterion = IntermediateLayersKnowledgeDistillationLossConfig([["conv1"]])
    manager = trained(
        [DistillationConfig(teacher, criterion), QuantizationAwareTrainingConfig()], student
    )
    seen = []
    student.conv1.register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(3):
        manager.model.eval()(IMAGES)
    references = [weakref.ref(item) for item in seen]
    seen.clear()
    gc.collect()
    assert not any(reference() is not None for reference in references)
    manager.close()


def test_quantization_under_bfloat16_autocast():
    manager = prepare_compression(toys.ConvNet(), QuantizationAwareTrainingConfig())
    optimizer = torch.optim.SGD(manager.model.parameters(), lr=0.05)
    manager.on_train_begin()
    for step in range(2):
        manager.on_step_begin(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = manager.model(IMAGES)
            loss = F.cross_entropy(output, LABELS)
        manager.on_after_compute_loss(IMAGES, output, loss).backward()
        optimizer.step()
    manager.on_train_end()
    assert classes(manager.model)["_model.fc"] == "ConvertedLinear"
