"""Criteria with Neural Compressor 2.6's fields, against numpy in float64."""

import gc
import weakref
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compression_plugins
import toys
from compression_manager import ConfigError
from compression_plugins.compat.neural_compressor import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    SelfKnowledgeDistillationLossConfig,
    prepare_compression,
)

INPUTS, TARGETS = toys.vectors(8).tensors


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def as_array(tensor):
    return tensor.detach().double().numpy()


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def divergence(student, teacher, temperature=1.0):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return (p * np.log(p / q)).sum(-1).mean()


def cross_entropy(student, teacher, temperature=1.0):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return -(p * np.log(q)).sum(-1).mean()


def first_loss(manager, inputs, output=None, task=None, teacher_output=None):
    manager.on_train_begin()
    manager.on_step_begin(0)
    model = manager.model
    if output is None:
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    task = F.cross_entropy(model(INPUTS), TARGETS) if task is None else task
    loss = manager.on_after_compute_loss(inputs, output, task, teacher_output)
    manager.close()
    return loss


def teach(teacher, criterion, student=None):
    conf = DistillationConfig(teacher_model=teacher, criterion=criterion)
    return prepare_compression(student or toys.mlp(), conf)


# Soft targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "reference"),
    [
        ("CE", lambda s, t: 9 * cross_entropy(s, t, 3)),
        ("KL", lambda s, t: 9 * divergence(s, t, 3)),
        ("MSE", lambda s, t: ((s - t) ** 2).mean()),
    ],
)
def test_soft_targets(loss_type, reference):
    teacher, student = toys.mlp(), toys.mlp()
    criterion = KnowledgeDistillationLossConfig(
        temperature=3.0, loss_types=["CE", loss_type], loss_weights=[0.3, 0.7]
    )
    task = F.cross_entropy(student(INPUTS), TARGETS)
    expected = 0.3 * task.item() + 0.7 * reference(
        as_array(student(INPUTS)), as_array(teacher(INPUTS))
    )
    loss = first_loss(teach(teacher, criterion, student), INPUTS, task=task)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


def test_divergence_does_not_shrink_with_the_number_of_classes():
    teacher, student = toys.mlp(classes=1000), toys.mlp(classes=1000)
    criterion = KnowledgeDistillationLossConfig(loss_types=["CE", "KL"], loss_weights=[0, 1])
    expected = divergence(as_array(student(INPUTS)), as_array(teacher(INPUTS)))
    loss = first_loss(teach(teacher, criterion, student), INPUTS)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-4)


def test_the_criterion_of_the_plugin_says_where_the_classes_of_images_are():
    images = torch.randn(2, 3, 4, 4)
    teacher = nn.Conv2d(3, 5, 1)
    options = {"loss_types": ["CE", "KL"], "loss_weights": [0, 1]}
    manager = teach(teacher, KnowledgeDistillationLossConfig(**options), nn.Conv2d(3, 5, 1))
    with pytest.raises(ConfigError, match="class_dimension=1"):
        first_loss(manager, images, task=torch.zeros(()))
    student = nn.Conv2d(3, 5, 1)
    criterion = compression_plugins.KnowledgeDistillationLossConfig(**options, class_dimension=1)
    loss = first_loss(teach(teacher, criterion, student), images, task=torch.zeros(()))
    pixels = [as_array(model(images).movedim(1, -1).reshape(-1, 5)) for model in (student, teacher)]
    np.testing.assert_allclose(loss.item(), divergence(*pixels), rtol=1e-5)


def test_the_default_criterion_is_soft_cross_entropy_in_halves():
    teacher, student = toys.mlp(), toys.mlp()
    task = torch.tensor(2.0)
    manager = prepare_compression(student, DistillationConfig(teacher))
    expected = 1 + 0.5 * cross_entropy(as_array(student(INPUTS)), as_array(teacher(INPUTS)))
    np.testing.assert_allclose(first_loss(manager, INPUTS, task=task).item(), expected, rtol=1e-5)


@pytest.mark.parametrize("weights", [[0.5], [0.5, -0.5], [0.5, 0.5, 0.0]])
def test_wrong_weights_are_config_errors(weights):
    with pytest.raises(ConfigError, match="loss_weights"):
        teach(toys.mlp(), KnowledgeDistillationLossConfig(loss_weights=weights))


# The teacher --------------------------------------------------------------------------------------


class Keyword(nn.Module):
    """Takes and returns dictionaries, as transformers do; refuses labels."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = toys.mlp(), wrap

    def forward(self, values):
        return self.wrap(self.inner(values))


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize(
    "wrap", [lambda logits: {"logits": logits}, lambda logits: SimpleNamespace(logits=logits)]
)
def test_teachers_of_dictionaries_are_called_without_labels(kind, wrap):
    teacher = Keyword(wrap)
    manager = teach(teacher, KnowledgeDistillationLossConfig(loss_weights=[0, 1]))
    batch = kind({"values": INPUTS, "labels": TARGETS})
    output = manager.model(INPUTS)
    expected = cross_entropy(as_array(output), as_array(teacher.inner(INPUTS)))
    loss = first_loss(manager, batch, output, torch.zeros(()))
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = toys.mlp()

    def forward(self, left, right):
        return self.inner(left + right)


def test_a_list_of_inputs_is_passed_by_position_as_in_2_6():
    teacher, student = Sum(), Sum()
    manager = teach(teacher, KnowledgeDistillationLossConfig(loss_weights=[0, 1]), student)
    batch = [INPUTS, INPUTS]
    output = manager.model(*batch)
    expected = cross_entropy(as_array(output), as_array(teacher(*batch)))
    loss = first_loss(manager, batch, output, torch.zeros(()))
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


def test_what_the_loop_passes_replaces_the_call_of_the_teacher():
    teacher, student = toys.mlp(), toys.mlp()
    passed = torch.randn(8, 4)
    manager = teach(teacher, KnowledgeDistillationLossConfig(loss_weights=[0, 1]), student)
    manager.on_train_begin()
    for teacher_output, expected in [(None, teacher(INPUTS)), (passed, passed)]:
        manager.on_step_begin(0)
        output = manager.model(INPUTS)
        loss = manager.on_after_compute_loss(INPUTS, output, torch.zeros(()), teacher_output)
        np.testing.assert_allclose(
            loss.item(), cross_entropy(as_array(output), as_array(expected)), rtol=1e-5
        )
    passed = weakref.ref(passed)
    del teacher_output, expected, loss
    gc.collect()
    assert passed() is None
    manager.close()


def test_no_teacher_takes_what_the_loop_passes():
    manager = teach(None, KnowledgeDistillationLossConfig(loss_weights=[0, 1]))
    passed = torch.randn(8, 4)
    expected = cross_entropy(as_array(manager.model(INPUTS)), as_array(passed))
    loss = first_loss(manager, INPUTS, task=torch.zeros(()), teacher_output=passed)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


def test_the_student_is_no_teacher_of_its_own():
    student = toys.mlp()
    with pytest.raises(ConfigError, match="student itself"):
        teach(student, KnowledgeDistillationLossConfig(), student)


# Layers -------------------------------------------------------------------------------------------


class Layered(nn.Module):
    """Layers that return a tensor, a tuple and a dictionary."""

    def __init__(self):
        super().__init__()
        self.plain, self.pair, self.named = nn.Linear(6, 5), Pair(), Named()

    def forward(self, values):
        hidden = self.plain(values)
        return self.named(self.pair(hidden)[1])["logits"]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, hidden):
        return hidden.sum(), self.inner(hidden)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 4)

    def forward(self, hidden):
        return {"logits": self.inner(hidden), "hidden": hidden}


def first_two(output):
    return output[:, :2]


@pytest.mark.parametrize(
    ("item", "feature"),
    [
        (["plain"], lambda model: model.plain(INPUTS)),
        ([("plain",)], lambda model: model.plain(INPUTS)),
        ([["plain", ""]], lambda model: model.plain(INPUTS)),
        (["plain", "plain"], lambda model: model.plain(INPUTS)),
        ([("plain",), ("plain",)], lambda model: model.plain(INPUTS)),
        ([["plain", first_two], ["plain", first_two]], lambda model: model.plain(INPUTS)[:, :2]),
        ([("pair", "1"), ("pair", "1")], lambda model: model.pair(model.plain(INPUTS))[1]),
        ([("named", "logits"), ("named", "logits")], lambda model: model(INPUTS)),
        ([""], lambda model: model(INPUTS)),
    ],
)
def test_forms_of_layer_mappings(item, feature):
    student, teacher = Layered(), Layered()
    with torch.no_grad():
        expected = ((as_array(feature(student)) - as_array(feature(teacher))) ** 2).mean()
    criterion = IntermediateLayersKnowledgeDistillationLossConfig(layer_mappings=[item])
    loss = first_loss(teach(teacher, criterion, student), INPUTS, task=torch.tensor(5.0))
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


@pytest.mark.parametrize("add_origin_loss", [False, True])
def test_types_and_weights_of_layers(add_origin_loss):
    student, teacher = Layered(), Layered()
    mappings = [["plain"], [("named", "logits")], [("pair", "1"), ("pair", "1")]]
    criterion = IntermediateLayersKnowledgeDistillationLossConfig(
        layer_mappings=mappings,
        loss_types=["L1", "KL", "MSE"],
        loss_weights=[0.5, 0.2, 0.3],
        add_origin_loss=add_origin_loss,
    )
    with torch.no_grad():
        plain = [as_array(model.plain(INPUTS)) for model in (student, teacher)]
        logits = [as_array(model(INPUTS)) for model in (student, teacher)]
        pair = [as_array(model.pair(model.plain(INPUTS))[1]) for model in (student, teacher)]
    expected = (
        0.5 * np.abs(plain[0] - plain[1]).mean()
        + 0.2 * divergence(*logits)
        + 0.3 * ((pair[0] - pair[1]) ** 2).mean()
        + 5 * add_origin_loss
    )
    loss = first_loss(teach(teacher, criterion, student), INPUTS, task=torch.tensor(5.0))
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


def test_rows_that_are_distributions_get_no_softmax():
    student, teacher = Layered(), Layered()
    mapping = [["named", lambda output: output["logits"].softmax(-1)]]
    criterion = IntermediateLayersKnowledgeDistillationLossConfig([mapping], ["KL"])
    with torch.no_grad():
        expected = divergence(as_array(student(INPUTS)), as_array(teacher(INPUTS)))
    loss = first_loss(teach(teacher, criterion, student), INPUTS)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("mappings", "message"),
    [
        ([["plan"]], "plain"),
        ([["plain", "plain", "plain"]], "no layer mapping"),
        ([[3]], "no layer mapping"),
        ("plain", "must be a list"),
        ([], "at least one item"),
    ],
)
def test_wrong_layer_mappings_are_config_errors(mappings, message):
    criterion = IntermediateLayersKnowledgeDistillationLossConfig(mappings)
    with pytest.raises(ConfigError, match=message):
        teach(Layered(), criterion, Layered())


def test_two_distillers_give_one_loss_with_the_task_counted_once():
    student, teacher = Layered(), Layered()
    confs = [
        DistillationConfig(teacher, KnowledgeDistillationLossConfig(loss_weights=[0.25, 0.75])),
        DistillationConfig(teacher, IntermediateLayersKnowledgeDistillationLossConfig([["plain"]])),
    ]
    with torch.no_grad():
        soft = cross_entropy(as_array(student(INPUTS)), as_array(teacher(INPUTS)))
        hint = ((as_array(student.plain(INPUTS)) - as_array(teacher.plain(INPUTS))) ** 2).mean()
    loss = first_loss(prepare_compression(student, confs), INPUTS, task=torch.tensor(4.0))
    np.testing.assert_allclose(loss.item(), 1 + 0.75 * soft + hint, rtol=1e-5)


# Self-distillation --------------------------------------------------------------------------------

GROUPS = [
    [["shallow.feature", "deep.feature"]],
    [["shallow.fc", "deep.fc"], ["middle.fc", "deep.fc"]],
    [["shallow.fc", "deep.fc"]],
]


def named_outputs():
    student = toys.mlp(classes=4)
    hidden = student[0](INPUTS)
    return student, {
        "shallow.feature": hidden,
        "deep.feature": torch.randn(8, 8),
        "shallow.fc": student[2](hidden),
        "middle.fc": student[2](hidden * 2),
        "deep.fc": torch.randn(8, 4),
    }


@pytest.mark.parametrize("argument", ["student_output", "teacher_output", "both"])
def test_self_distillation_over_named_outputs(argument):
    student, outputs = named_outputs()
    criterion = SelfKnowledgeDistillationLossConfig(
        layer_mappings=GROUPS,
        temperature=3.0,
        loss_types=["L2", "KL", "CE"],
        loss_weights=[0.5, 0.05, 0.02],
        add_origin_loss=True,
    )
    values = {name: as_array(value) for name, value in outputs.items()}
    expected = (
        2
        + 0.5 * np.sqrt(((values["shallow.feature"] - values["deep.feature"]) ** 2).sum())
        + 0.05 * divergence(values["shallow.fc"] / 3, values["deep.fc"] / 3)
        + 0.05 * divergence(values["middle.fc"] / 3, values["deep.fc"] / 3)
        + 0.02 * cross_entropy(values["shallow.fc"], values["deep.fc"])
    )
    manager = teach(toys.mlp(), criterion, student)
    loss = first_loss(
        manager,
        INPUTS,
        torch.randn(8, 4) if argument == "teacher_output" else outputs,
        torch.tensor([2.0]),
        None if argument == "student_output" else outputs,
    )
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)


def test_three_unit_losses_are_three():
    student = toys.mlp()
    ones, zeros = torch.ones(1, 1, requires_grad=True), torch.zeros(1, 1)
    criterion = SelfKnowledgeDistillationLossConfig(
        [[["one", "zero"]]] * 3, loss_types=["L2"] * 3, loss_weights=[1.0] * 3
    )
    manager = teach(None, criterion, student)
    loss = first_loss(manager, INPUTS, {"one": ones, "zero": zeros}, torch.tensor(7.0))
    assert loss.item() == 3.0


def test_self_distillation_without_types_and_weights():
    student, outputs = named_outputs()
    criterion = SelfKnowledgeDistillationLossConfig(GROUPS[1:])
    values = {name: as_array(value) for name, value in outputs.items()}
    shallow = cross_entropy(values["shallow.fc"], values["deep.fc"])
    middle = cross_entropy(values["middle.fc"], values["deep.fc"])
    loss = first_loss(teach(None, criterion, student), INPUTS, outputs, torch.tensor(7.0))
    np.testing.assert_allclose(loss.item(), (2 * shallow + middle) / 2, rtol=1e-5)


def test_a_name_of_a_layer_means_the_dictionary():
    student = toys.mlp()
    outputs = {"0": torch.ones(1, 1, requires_grad=True), "2": torch.zeros(1, 1)}
    criterion = SelfKnowledgeDistillationLossConfig([[["0", "2"]]], loss_types=["L2"])
    assert first_loss(teach(None, criterion, student), INPUTS, outputs).item() == 1.0


def test_a_missing_entry_names_the_nearest():
    student, outputs = named_outputs()
    criterion = SelfKnowledgeDistillationLossConfig([[["shalow.fc", "deep.fc"]]])
    manager = teach(None, criterion, student)
    manager.on_train_begin()
    manager.on_step_begin(0)
    with pytest.raises(ConfigError, match=r"'shalow.fc'.*'shallow.fc'"):
        manager.on_after_compute_loss(INPUTS, outputs, torch.zeros(()))
    manager.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"loss_types": ["CE"]}, "loss_types"),
        ({"loss_types": ["NO"] * 3}, "'NO'"),
        ({"loss_weights": 0.5}, "loss_weights must be a list"),
        ({"add_origin_loss": 1}, "add_origin_loss"),
        ({"layer_mappings": [[["one", "two", "three"]]]}, "no layer mapping"),
    ],
)
def test_wrong_self_distillation_is_a_config_error(options, message):
    criterion = SelfKnowledgeDistillationLossConfig(**{"layer_mappings": GROUPS, **options})
    with pytest.raises(ConfigError, match=message):
        teach(None, criterion)
