"""Where the quantized teacher finds its logits, and what it leaves alone."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import CheckpointMismatchError, CompressionError, ConfigError
from compression_plugins import QuantizedTeacher
from toy_teachers import CountingTeacher, condition


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def wide(**options):
    """Eight bits for logits up to about 12, so that no toy model is clipped."""
    return {"scale": 0.1, **options}


# The output dimension and the logits --------------------------------------------------------------


def test_output_dimension_comes_from_the_first_output():
    teacher = QuantizedTeacher(toys.mlp(), **wide())
    assert teacher.output_dimension is None
    teacher.get_logits(torch.randn(2, 6))
    assert teacher.output_dimension == 4


def test_output_dimension_comes_from_the_example_without_training_anything():
    model, inputs = toys.ConvNet(dropout=0.5), torch.randn(2, 1, 8, 8)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    teacher = QuantizedTeacher(model, example_inputs=inputs)
    assert teacher.output_dimension == 4
    toys.assert_identical(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert QuantizedTeacher(model, output_dimension=4).output_dimension == 4


def test_a_wrong_output_dimension_is_an_error_with_both_numbers():
    message = r"output_dimension is 7, but the teacher's logits have 4 classes"
    teacher = QuantizedTeacher(toys.mlp(), output_dimension=7)
    with pytest.raises(ConfigError, match=message):
        teacher(torch.randn(2, 6))
    with pytest.raises(ConfigError, match=message):
        teacher.export_graph(torch.randn(2, 6))
    model = toys.mlp()
    before = condition(model)
    with pytest.raises(ConfigError, match=message):
        QuantizedTeacher(model, output_dimension=7, example_inputs=torch.randn(2, 6))
    assert condition(model) == before


def test_a_later_output_of_another_width_is_an_error():
    teacher = QuantizedTeacher(nn.Identity())
    teacher(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"output_dimension is 3, but .* have 5 classes"):
        teacher(torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda logits: logits, None),
        (lambda logits: (logits, 1), None),
        (lambda logits: [1, logits], 1),
        (lambda logits: {"logits": logits, "loss": 0}, None),
        (lambda logits: OrderedDict(main=logits, logits=0), "main"),
        (lambda logits: SimpleNamespace(logits=logits), None),
    ],
)
def test_logits_are_picked_out_of_what_the_model_returns(wrap, output):
    model, inputs = toys.mlp(), torch.randn(3, 6)
    expected = QuantizedTeacher(model, **wide())(inputs)
    teacher = QuantizedTeacher(CountingTeacher(model, wrap), output=output, **wide())
    assert torch.equal(teacher.get_logits(inputs), expected)


def test_an_output_without_logits_is_an_error_that_names_the_option():
    teacher = QuantizedTeacher(CountingTeacher(toys.mlp(), lambda logits: {"logit": logits}))
    with pytest.raises(ConfigError, match=r"with QuantizedTeacher\(output=\.\.\.\); did you") as e:
        teacher(torch.randn(2, 6))
    assert e.value.option is None


@pytest.mark.parametrize(
    ("inputs", "count", "keywords"),
    [
        (torch.zeros(2, 6), 1, []),
        ((torch.zeros(2, 6), None), 2, []),
        ((None, torch.zeros(2, 6)), 2, []),
        ({"x": torch.zeros(2, 6), "input": 3, "labels": 1, "label": 1}, 0, ["x", "input"]),
    ],
)
def test_the_teacher_is_called_as_the_student_without_labels(inputs, count, keywords):
    model = CountingTeacher(nn.Identity(), lambda first: torch.zeros(2, 4))
    QuantizedTeacher(model).get_logits(inputs)
    ((args, kwargs),) = model.calls
    assert len(args) == count
    assert list(kwargs) == keywords


# Frozen, in eval mode, otherwise untouched --------------------------------------------------------


def test_the_teacher_is_frozen_and_nothing_else_changes():
    model = toys.ConvNet(dropout=0.5)
    before = copy.deepcopy(model.state_dict())
    teacher = QuantizedTeacher(model, **wide())
    assert teacher.model is model
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    teacher(torch.randn(2, 1, 8, 8))
    toys.assert_identical(model.state_dict(), before)


@pytest.mark.parametrize("call", ["teacher", "model", "part"])
def test_it_runs_in_eval_mode_whatever_train_is_called_on(call):
    model, inputs = toys.ConvNet(dropout=0.5), torch.randn(16, 1, 8, 8)
    teacher = QuantizedTeacher(model, **wide())
    expected, before = teacher(inputs), copy.deepcopy(model.state_dict())
    {"teacher": teacher, "model": model, "part": model.dropout}[call].train()
    assert torch.equal(teacher(inputs), expected)
    toys.assert_identical(model.state_dict(), before)
    assert not any(module.training for module in model.modules())


def test_train_of_something_around_it_leaves_the_teacher_in_eval_mode():
    model = toys.ConvNet()
    around = nn.ModuleDict({"teacher": QuantizedTeacher(model), "student": toys.mlp()}).train()
    assert around["student"].training
    assert not any(module.training for module in model.modules())


# Copies, states, dtypes ---------------------------------------------------------------------------


def test_a_deep_copy_is_independent_and_equal():
    inputs = torch.randn(4, 6)
    teacher = QuantizedTeacher(toys.mlp(), symmetric=False, scale=0.05, zero_point=3)
    expected = teacher(inputs)
    copied = copy.deepcopy(teacher)
    teacher.model[0].weight.data.zero_()
    teacher.scale.fill_(7)
    assert torch.equal(copied(inputs), expected)
    assert copied.output_dimension == 4


@pytest.mark.parametrize("bits", [8, 32])
def test_the_state_goes_round(bits):
    inputs = torch.randn(4, 6)
    options = {"bits": bits, "symmetric": False}
    teacher = QuantizedTeacher(toys.mlp(), scale=10.0 / 2**bits, zero_point=2, **options)
    other = QuantizedTeacher(toys.mlp(), **options)
    other.load_state_dict(teacher.state_dict())
    assert torch.equal(other(inputs), teacher(inputs))
    toys.assert_identical(dict(other.state_dict()), dict(teacher.state_dict()))


@pytest.mark.parametrize("other", [{"bits": 4}, {"symmetric": False}])
def test_the_state_of_other_integers_is_refused_before_anything_changes(other):
    teacher = QuantizedTeacher(toys.mlp())
    before = copy.deepcopy(teacher.state_dict())
    state = QuantizedTeacher(toys.mlp(), **other).state_dict()
    with pytest.raises(CheckpointMismatchError, match=r"int8 symmetric .* -127 to 127"):
        teacher.load_state_dict(state)
    toys.assert_identical(dict(teacher.state_dict()), dict(before))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_scales_keep_their_digits_through_casts(cast):
    teacher = QuantizedTeacher(toys.mlp(), scale=0.1)
    scale = teacher.scale.clone()
    dtype = getattr(teacher, cast)().model[0].weight.dtype
    output = teacher(torch.randn(2, 6, dtype=dtype))
    assert output.dtype == dtype
    toys.assert_identical(teacher.scale, scale)
    toys.assert_identical(teacher.float().scale, scale)


def test_moves_to_another_device_as_a_whole():
    teacher = QuantizedTeacher(toys.mlp()).to("meta")
    assert {tensor.device.type for tensor in teacher.state_dict().values()} == {"meta"}
    assert teacher(torch.empty(2, 6, device="meta")).shape == (2, 4)
    assert QuantizedTeacher(toys.mlp().to("meta")).scale.device.type == "meta"


# Bad arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "1 to 32 bits, got bits=0"),
        ({"bits": 33}, "1 to 32 bits, got bits=33"),
        ({"bits": 8.0}, "bits .* is an integer, got 8.0"),
        ({"scale": 0.0}, "QuantizedTeacher.scale must be a finite number above 0, got 0.0"),
        ({"scale": -0.1}, "QuantizedTeacher.scale must be a finite number above 0"),
        ({"scale": float("nan")}, "QuantizedTeacher.scale must be a finite number above 0"),
        ({"scale": 1e-40}, "scale must lie between 1.17549e-38 and .* got 1e-40"),
        ({"scale": 3e36}, r"scale must lie between .* and 2.67939e\+36.* got 3e\+36"),
        ({"zero_point": 3}, "zero_point must be 0 with symmetric=True, got 3; use symmetric=False"),
        ({"zero_point": 0.5, "symmetric": False}, "zero_point must be an integer from -128 to 127"),
        ({"zero_point": 128, "symmetric": False}, "zero_point must be an integer .*, got 128"),
        ({"zero_point": False}, "zero_point must be an integer"),
        ({"scale": 0.1, "dynamic": True}, "scale=0.1 has no use with dynamic=True"),
        ({"zero_point": 0, "dynamic": True}, "zero_point=0 has no use with dynamic=True"),
        ({"output_dimension": 0}, "output_dimension must be an integer of at least 1, got 0"),
        ({"symmetric": 1}, "symmetric of a quantization scheme is true or false, got 1"),
        ({"dynamic": None}, "dynamic of a quantization scheme is true or false, got None"),
        ({"weights": "int8"}, "QuantizedTeacher.weights must be of type bool, got 'int8'"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_model_as_it_was(options, message):
    model = toys.mlp()
    before = condition(model)
    with pytest.raises(CompressionError, match=message):
        QuantizedTeacher(model, **options)
    assert condition(model) == before


def test_a_model_is_a_module():
    with pytest.raises(ConfigError, match=r"QuantizedTeacher.model must be of type Module"):
        QuantizedTeacher(F.relu)
