"""What is looked at once, with the first loss."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import ConfigError, PluginError, prepare_compression
from compression_plugins import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    SelfKnowledgeDistillationLossConfig,
    TokenDistillationLossConfig,
)
from compression_plugins.distillation.preflight import warn_if_worse
from toy_teachers import begin, criterion


class Answers(nn.Module):
    """Predicts the class that the first feature names."""

    def __init__(self, offset):
        super().__init__()
        self.offset = offset
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input):
        classes = (input[:, 0].long() + self.offset) % toys.CLASSES
        return torch.nn.functional.one_hot(classes, toys.CLASSES).float() * self.scale


INPUTS = torch.arange(16.0).reshape(16, 1) % toys.CLASSES
TARGET = INPUTS[:, 0].long()


def run(student, teacher):
    manager = begin(prepare_compression(student, [DistillationConfig(teacher, criterion())]))
    output = student(INPUTS)
    loss = manager.on_after_compute_loss(INPUTS, output, output.mean() * 0, target=TARGET)
    if loss.requires_grad:
        loss.backward()
    return manager


def test_a_teacher_that_is_worse_than_the_student_is_warned_of():
    with pytest.warns(UserWarning, match=r"teacher is right in 0\.0% of 16 .*student in 100\.0%"):
        run(Answers(0), Answers(1))


def test_a_resumed_training_is_not_told_again():
    first = run(Answers(0), Answers(0))
    first.on_before_optimizer_step()
    first.on_step_end()
    first.on_epoch_end()
    student = Answers(0)
    manager = prepare_compression(student, [DistillationConfig(Answers(1), criterion())])
    manager.load_state_dict(first.state_dict())
    manager.on_train_begin()
    manager.on_epoch_begin(1)
    manager.on_step_begin(0)
    output = student(INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.on_after_compute_loss(INPUTS, output, output.mean() * 0, target=TARGET)


def test_outputs_that_the_loop_passes_are_not_judged():
    config = DistillationConfig(teacher_outputs="caller", criterion=criterion())
    manager = begin(prepare_compression(Answers(0), [config]))
    output = manager.model(INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.on_after_compute_loss(
            INPUTS, output, output.mean() * 0, Answers(1)(INPUTS), target=TARGET
        )


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (1, 2)])
def test_one_that_is_as_good_or_better_is_not(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Answers(pair[0]), Answers(pair[1]))


@pytest.mark.parametrize(
    ("only_student", "only_teacher", "warns"),
    [(10, 0, True), (9, 0, False), (13, 3, False), (14, 2, False), (16, 2, True)],
)
def test_a_few_unlucky_samples_are_no_reason(only_student, only_teacher, warns):
    right = torch.tensor([[0.0, 1.0]])
    wrong = torch.tensor([[1.0, 0.0]])
    student = torch.cat([right] * only_student + [wrong] * only_teacher)
    teacher = torch.cat([wrong] * only_student + [right] * only_teacher)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_worse(
            torch.ones(len(student), dtype=torch.long),
            student=lambda: student,
            teacher=lambda: teacher,
            plugin="distillation",
        )
    assert bool(caught) is warns


@pytest.mark.parametrize("target", [torch.ones(20), torch.ones(20, 2, dtype=torch.long)])
def test_targets_that_are_no_classes_judge_nobody(target):
    right, wrong = (
        torch.tensor([[0.0, 1.0]]).repeat(20, 1),
        torch.tensor([[1.0, 0.0]]).repeat(20, 1),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_worse(target, student=lambda: right, teacher=lambda: wrong, plugin="distillation")


class Tokens(nn.Module):
    """Predicts at each position the token there plus `offset`."""

    def __init__(self, offset):
        super().__init__()
        self.offset = offset
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens, labels=None):
        return F.one_hot((tokens + self.offset) % 4, 4).float() * self.scale


@pytest.mark.parametrize(
    ("criterion", "student", "teacher", "warns"),
    [
        (TokenDistillationLossConfig(shift=True), 1, 0, True),
        # Who repeats the present token is not right where the next one is asked for.
        (TokenDistillationLossConfig(shift=True), 0, 1, False),
        (TokenDistillationLossConfig(), 0, 1, True),
        (TokenDistillationLossConfig(), 1, 0, False),
        (criterion(), 0, 1, False),  # it is unclear whether labels are shifted
    ],
)
def test_labels_of_sequences_are_compared_where_they_belong(criterion, student, teacher, warns):
    tokens = torch.arange(24).reshape(2, 12) % 4  # each token is followed by the next number
    labels = tokens.clone()
    labels[0, :2] = -100
    batch = {"tokens": tokens, "labels": labels}
    model = Tokens(student)
    manager = begin(prepare_compression(model, [DistillationConfig(Tokens(teacher), criterion)]))
    output = model(**batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager.on_after_compute_loss(batch, output, output.mean() * 0)
    assert bool(caught) is warns
    if warns:
        # Of 24 two are masked; shifted, the first of them and both last positions have no label.
        counted = 21 if criterion.shift else 22
        assert f"0.0% of {counted} cases" in str(caught[0].message)


def test_labels_that_the_model_was_called_with_are_targets_too():
    class Named(Answers):
        def forward(self, input, labels=None):
            return super().forward(input)

    model = Named(0)
    manager = begin(prepare_compression(model, [DistillationConfig(Named(1), criterion())]))
    batch = {"input": INPUTS, "labels": TARGET}
    output = model(**batch)
    with pytest.warns(UserWarning, match=r"right in 0\.0% of 16 cases"):
        manager.on_after_compute_loss(batch, output, output.mean() * 0)


def test_the_report_estimates_the_memory():
    student, teacher = nn.Linear(1, toys.CLASSES), nn.Linear(1, toys.CLASSES)
    teacher.register_buffer("table", torch.zeros(2**20))
    manager = run(student, teacher)
    assert manager.report().notes == {"distillation": "memory: student 0.0 MiB, teacher 4.0 MiB"}
    assert "distillation: memory: student 0.0 MiB, teacher 4.0 MiB" in str(manager.report())
    assert manager.report().to_dict()["notes"] == manager.report().notes


def test_with_example_inputs_the_memory_is_known_at_prepare():
    big = nn.Sequential(nn.Linear(1, 2**18), nn.Linear(2**18, toys.CLASSES))
    config = DistillationConfig(big, IntermediateLayersKnowledgeDistillationLossConfig(["0"]))
    manager = prepare_compression(copy.deepcopy(big), [config], example_inputs=torch.zeros(2, 1))
    # 2 * 2**18 + 4 * 2**18 + 4 float32 weights each; 2 * 2**18 float32 outputs of each layer.
    assert manager.report().notes == {
        "distillation": "memory: student 6.0 MiB, teacher 6.0 MiB, features kept per step 4.0 MiB"
    }


def test_features_of_a_student_that_teaches_itself_count():
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4))
    criterion = SelfKnowledgeDistillationLossConfig([[["0", "1"]]])
    manager = begin(prepare_compression(model, [DistillationConfig(criterion=criterion)]))
    inputs = torch.zeros(2**16, 1)  # 2**16 * 4 float32 of each of two layers
    output = model(inputs)
    manager.on_after_compute_loss(inputs, output, output.mean())
    assert manager.report().notes == {
        "distillation": "memory: student 0.0 MiB, features kept per step 2.0 MiB"
    }


@pytest.mark.parametrize(
    "options",
    [
        KnowledgeDistillationLossConfig(loss_types=("CE", "DKD")),
        IntermediateLayersKnowledgeDistillationLossConfig(["0"], "DKD"),
    ],
)
def test_a_loss_of_labels_needs_none_with_example_inputs(options):
    student, teacher = (nn.Sequential(nn.Linear(1, toys.CLASSES)) for _ in range(2))
    config = DistillationConfig(teacher, options)
    prepare_compression(student, [config], example_inputs=INPUTS).close()


@pytest.mark.parametrize("example_inputs", [None, INPUTS])
def test_a_teacher_that_takes_other_inputs_is_named(example_inputs):
    config = DistillationConfig(nn.Linear(7, toys.CLASSES))
    student = nn.Linear(1, toys.CLASSES)

    def until_first_loss():
        manager = begin(prepare_compression(student, [config], example_inputs=example_inputs))
        manager.on_after_compute_loss(INPUTS, student(INPUTS), student(INPUTS).mean())

    with pytest.raises(ConfigError, match=r"teacher cannot be called .*16x1 and 7x4.*_forward"):
        until_first_loss()


def test_a_teacher_that_fails_later_is_no_mistake_of_the_configuration():
    teacher, student = nn.Linear(1, toys.CLASSES), nn.Linear(1, toys.CLASSES)
    manager = begin(prepare_compression(student, [DistillationConfig(teacher)]))
    for inputs, kind in ((INPUTS, None), (INPUTS[:, :0], PluginError)):
        with pytest.raises(kind) if kind else nullcontext():
            manager.on_after_compute_loss(inputs, student(INPUTS), student(INPUTS).mean())
