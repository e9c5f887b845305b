"""What an ensemble of teachers answers, and what it refuses."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toys
from compression_manager import CheckpointMismatchError, ConfigError, prepare_compression
from compression_plugins import DistillationConfig, EnsembleTeacher
from compression_plugins.distillation.teachers.teacher import Teacher, weights_hash
from toy_teachers import CountingTeacher, condition, criterion, first_loss

MODES = ("average", "geometric", "maximum", "median")


class Fixed(nn.Module):
    """Answers with the given logits."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", torch.as_tensor(logits))

    def forward(self, input):
        return self.logits


def ensemble(logits, *args, **options):
    return EnsembleTeacher([Fixed(item) for item in logits], *args, **options)


def answer(logits, *args, **options):
    return ensemble(logits, *args, **options)(torch.zeros(1))


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def combined(logits, mode, weights=None):
    """The distribution in float64, with probabilities and not their logarithms."""
    probabilities = np.stack([softmax(np.asarray(item, np.float64)) for item in logits])
    weights = np.ones(len(logits)) if weights is None else np.asarray(weights, np.float64)
    shares = (weights / weights.sum()).reshape(-1, *[1] * (probabilities.ndim - 1))
    result = {
        "average": lambda: (shares * probabilities).sum(0),
        "geometric": lambda: np.prod(probabilities**shares, axis=0),
        "maximum": lambda: probabilities.max(0),
        "median": lambda: np.median(probabilities, axis=0),
    }[mode]()
    return result / result.sum(-1, keepdims=True)


def random_logits(count, *shape, seed=0):
    return 3 * torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def logits_and_weights(draw):
    count, classes = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    logits = random_logits(count, 3, classes, seed=draw(st.integers(0, 10_000))).double()
    weights = draw(st.lists(st.floats(0.01, 10), min_size=count, max_size=count))
    return logits, weights


# The combination ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_softmax_of_the_output_is_the_combined_distribution(mode, count, shape):
    logits = random_logits(count, *shape)
    output = answer(logits, mode=mode)
    expected = combined(logits.numpy(), mode)
    assert output.dtype == torch.float32
    np.testing.assert_allclose(output.softmax(-1).numpy(), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(output.exp().numpy(), expected, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=50)
@given(logits_and_weights(), st.sampled_from(["average", "geometric"]))
def test_weights_are_shares(drawn, mode):
    logits, weights = drawn
    output = answer(logits, weights, mode)
    np.testing.assert_allclose(output.exp().numpy(), combined(logits.numpy(), mode, weights), 1e-9)
    doubled = answer(logits, [2 * weight for weight in weights], mode)
    torch.testing.assert_close(doubled, output)


@settings(deadline=None, max_examples=50)
@given(logits_and_weights(), st.sampled_from(MODES), st.randoms(use_true_random=False))
def test_order_of_the_teachers_has_no_effect(drawn, mode, random):
    logits, weights = drawn
    order = list(range(len(weights)))
    random.shuffle(order)
    given_weights = weights if mode in ("average", "geometric") else None
    shuffled = given_weights and [weights[index] for index in order]
    torch.testing.assert_close(
        answer(logits[order], shuffled, mode), answer(logits, given_weights, mode)
    )


@settings(deadline=None, max_examples=50)
@given(logits_and_weights(), st.sampled_from(MODES), st.floats(-1e3, 1e3))
def test_a_constant_added_to_one_teachers_logits_has_no_effect(drawn, mode, constant):
    logits, _ = drawn
    moved = logits.clone()
    moved[0] += constant
    torch.testing.assert_close(answer(moved, mode=mode), answer(logits, mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equal_teachers_answer_as_one(mode, count):
    logits = random_logits(1, 4, 5)[0]
    output = answer([logits] * count, mode=mode)
    torch.testing.assert_close(output, logits.log_softmax(-1))


@pytest.mark.parametrize("mode", ["average", "geometric"])
def test_a_teacher_of_weight_zero_has_no_effect_and_is_not_run(mode):
    first, second = CountingTeacher(toys.mlp()), CountingTeacher(toys.mlp())
    inputs = torch.randn(3, 6)
    output = EnsembleTeacher([first, second], [1, 0], mode)(inputs)
    torch.testing.assert_close(output, first.inner(inputs).log_softmax(-1))
    assert second.calls == []


@pytest.mark.parametrize("mode", MODES)
def test_finite_logits_of_any_size_give_finite_results(mode):
    logits = torch.tensor([[1e4, -1e4, 0.0, -1e4], [-1e4, 1e4, 0.0, -1e4], [0.0, -1e4, 1e4, -1e4]])
    output = answer(logits, mode=mode)
    assert output.isfinite().all()
    # In float64 and with logarithms throughout, whose probabilities would all be 0.
    parts = logits.double().log_softmax(-1).numpy()
    raw = {
        "average": np.logaddexp.reduce(parts - np.log(3)),
        "geometric": parts.mean(0),
        "maximum": parts.max(0),
        "median": np.median(parts, axis=0),
    }[mode]
    expected = raw - np.logaddexp.reduce(raw)
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["average", "maximum"])
def test_a_class_that_one_teacher_rules_out_is_left_to_the_others(mode):
    logits = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    output = answer(logits, mode=mode)
    np.testing.assert_allclose(output.exp().numpy(), combined(logits.numpy(), mode), rtol=1e-6)


def test_the_geometric_mean_rules_out_what_one_teacher_rules_out():
    output = answer(torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 1.0, 0.0]]), mode="geometric")
    assert output[2] == -torch.inf
    assert output[:2].isfinite().all()


def test_half_precision_is_combined_in_float32():
    logits = random_logits(3, 2, 5)
    for dtype in (torch.float16, torch.bfloat16):
        output = answer(logits.to(dtype))
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, answer(logits.to(dtype).float()))
    mixed = answer([logits[0].double(), logits[1].bfloat16()])
    assert mixed.dtype == torch.float64


def test_huge_and_tiny_weights_are_shares_too():
    logits = random_logits(2, 2, 5)
    equal = answer(logits)
    torch.testing.assert_close(answer(logits, [1e308, 1e308]), equal)
    torch.testing.assert_close(answer(logits, [5e-324, 5e-324]), equal)


# How it is called ---------------------------------------------------------------------------------


def test_teachers_are_called_as_the_loop_calls_the_student():
    first, second = CountingTeacher(toys.mlp()), CountingTeacher(toys.mlp())
    teacher = Teacher(EnsembleTeacher([first, second]))
    inputs, labels = torch.randn(2, 6), torch.tensor([0, 1])
    expected = teacher.run(inputs)
    torch.testing.assert_close(teacher.run((inputs,)), expected)
    torch.testing.assert_close(teacher.run({"x": inputs, "labels": labels}), expected)
    assert [list(kwargs) for _, kwargs in second.calls] == [[], [], ["x"]]
    assert not expected.requires_grad


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda logits: (logits, 1), None),
        (lambda logits: {"logits": logits, "loss": 0}, None),
        (lambda logits: {"main": logits, "logits": 0}, "main"),
        (lambda logits: SimpleNamespace(logits=logits), None),
    ],
)
def test_logits_are_picked_out_of_what_the_teachers_return(wrap, output):
    inner, inputs = toys.mlp(), torch.randn(2, 6)
    teacher = EnsembleTeacher([CountingTeacher(inner, wrap)], output=output)
    torch.testing.assert_close(teacher(inputs), inner(inputs).log_softmax(-1))


def test_the_same_object_twice_counts_twice():
    one, other = Fixed([0.0, 2.0]), Fixed([1.0, 0.0])
    twice = EnsembleTeacher([one, one, other])
    weighted = EnsembleTeacher([one, other], [2, 1])
    torch.testing.assert_close(twice(torch.zeros(1)), weighted(torch.zeros(1)))


def test_the_plugin_freezes_all_members_and_restores_them():
    members = [toys.ConvNet(dropout=0.5), toys.ConvNet(dropout=0.5)]
    before = [condition(member) for member in members]
    inputs = torch.randn(4, 1, 8, 8)
    config = DistillationConfig(
        teacher_model=EnsembleTeacher(members), criterion=criterion(temperature=2.0)
    )
    manager = prepare_compression(toys.ConvNet(), [config])
    frozen = {value for member in members for part in condition(member) for value in part.values()}
    assert frozen == {False}
    first_loss(manager, inputs)
    manager.close()
    assert [condition(member) for member in members] == before


def test_a_temperature_divides_the_combined_log_probabilities():
    logits, inputs = random_logits(2, 4, toys.CLASSES), torch.zeros(4, 6)
    config = DistillationConfig(
        teacher_model=ensemble(logits), criterion=criterion("CE", 3.0, (0.0, 1.0))
    )
    loss = first_loss(prepare_compression(toys.mlp(), [config]), inputs)
    targets = softmax(np.log(combined(logits.numpy(), "average")) / 3)
    # The student's zeros are uniform at any temperature: the cross-entropy is log(classes).
    expected = 9 * -(targets * np.log(1 / toys.CLASSES)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# What it refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], r"weights must be a list with a number for each of the 2 teachers, got \[1\]"),
        (0.5, "weights must be a list with a number for each of the 2 teachers, got 0.5"),
        ("11", "weights must be a list"),
        ([1, -1], r"weights\[1\] must be a finite number of at least 0, got -1"),
        ([float("nan"), 1], r"weights\[0\] must be a finite number"),
        ([float("inf"), 1], r"weights\[0\] must be a finite number"),
        ([True, 1], r"weights\[0\] must be a finite number"),
        ([0, 0.0], r"weights must not all be 0"),
    ],
)
def test_invalid_weights_are_an_error(weights, message):
    with pytest.raises(ConfigError, match=f"EnsembleTeacher.{message}"):
        ensemble(random_logits(2, 3), weights)


@pytest.mark.parametrize("mode", ["maximum", "median"])
def test_weights_without_use_are_an_error(mode):
    with pytest.raises(ConfigError, match=f"weights has no use with mode='{mode}'"):
        ensemble(random_logits(2, 3), [1, 1], mode)


def test_an_unknown_mode_is_an_error_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"EnsembleTeacher.mode got 'mean'"):
        ensemble(random_logits(2, 3), mode="mean")
    with pytest.raises(ConfigError, match=r"did you mean 'geometric'"):
        ensemble(random_logits(2, 3), mode="geometrical")


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ([], "must hold at least one model"),
        (nn.Sequential(nn.Identity()), "must be a list of models, got a Sequential"),
        (3, "must be a list of models, got a int"),
        ([nn.Identity(), torch.relu], r"teachers\[1\] must be of type Module"),
    ],
)
def test_what_is_no_list_of_models_is_an_error(teachers, message):
    with pytest.raises(ConfigError, match=message):
        EnsembleTeacher(teachers)


def test_other_classes_are_an_error_with_the_teachers_number():
    teacher = EnsembleTeacher([toys.mlp(), toys.mlp(), toys.mlp(classes=7)])
    message = r"logits of teacher 2 have shape \(2, 7\), those of teacher 0 \(2, 4\)"
    with pytest.raises(ConfigError, match=message):
        teacher(torch.zeros(2, 6))


def test_output_without_logits_is_an_error_with_the_teachers_number():
    odd = CountingTeacher(toys.mlp(), lambda logits: {"logit": logits})
    message = r"ensemble's teacher 1 returned dict.*EnsembleTeacher\(output=\.\.\.\).*logit"
    with pytest.raises(ConfigError, match=message):
        EnsembleTeacher([toys.mlp(), odd])(torch.zeros(2, 6))


def test_state_of_another_mode_or_of_other_weights_is_refused():
    members = [toys.mlp(), toys.mlp()]
    state = EnsembleTeacher(members, [3, 1]).state_dict()
    same = EnsembleTeacher(copy.deepcopy(members), [0.75, 0.25])
    same.load_state_dict(state)
    for other in (EnsembleTeacher(members), EnsembleTeacher(members, [3, 1], "geometric")):
        with pytest.raises(CheckpointMismatchError, match=r"mode='average' and weights \[0.75"):
            other.load_state_dict(state)


def test_mode_and_weights_are_part_of_the_hash_of_checkpoints():
    members = [toys.mlp(), toys.mlp()]
    ensembles = [
        EnsembleTeacher(members, [3, 1]),
        EnsembleTeacher(members, [1, 3]),
        EnsembleTeacher(members),
        EnsembleTeacher(members, mode="median"),
    ]
    assert len({weights_hash(item) for item in ensembles}) == 4


@pytest.mark.parametrize("mode", MODES)
def test_classes_of_images_are_where_it_is_said(mode):
    logits = random_logits(3, 2, 5, 4, 6)
    given = answer(logits, mode=mode, class_dimension=1)
    expected = combined(logits.movedim(2, -1), mode)
    np.testing.assert_allclose(given.exp().movedim(1, -1).numpy(), expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ConfigError, match=r"class_dimension=1 for images \(N, classes, height"):
        answer(logits, mode=mode)
    assert answer(logits, mode=mode, class_dimension=-1).shape == (2, 5, 4, 6)
