"""Intermediate layers: values, gradients, projections, and what is kept of features."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toys
from compression_manager import ConfigError, LifecycleError, prepare_compression
from compression_plugins import (
    AdaptiveSchedule,
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    LinearSchedule,
    QATConfig,
)
from compression_plugins.distillation.losses import kd_loss
from toy_teachers import CountingTeacher, begin, published

IMAGES = toys.images(8).tensors[0]


def layers(*mappings, **options):
    return IntermediateLayersKnowledgeDistillationLossConfig(list(mappings), **options)


def start(student, teacher, criterion, *others, **arguments):
    """Prepare, and enter the first step with an optimizer tracked."""
    config = DistillationConfig(teacher, criterion)
    manager = prepare_compression(student, [config, *others], **arguments)
    manager.track(optimizer=torch.optim.SGD(student.parameters(), 0.1))
    return begin(manager)


def loss_of(manager, inputs=IMAGES):
    output = manager.model(inputs)
    return manager.on_after_compute_loss(inputs, output, output.mean() * 0)


def conv1_of(model, inputs=IMAGES):
    with torch.no_grad():
        return F.conv2d(inputs, model.conv1.weight, padding=1).double().numpy()


def test_mse_of_a_layer_equals_numpy_and_trains_the_layer():
    torch.manual_seed(0)
    student, teacher = toys.ConvNet(), toys.ConvNet()
    manager = start(student, teacher, layers("conv1", loss_weights=3.0))
    total = loss_of(manager)
    expected = np.mean((conv1_of(student) - conv1_of(teacher)) ** 2)
    assert published(manager)["loss/distillation/MSE/conv1"] == pytest.approx(expected, rel=1e-5)
    assert total.item() == pytest.approx(3 * expected, rel=1e-5)
    total.backward()
    assert student.conv1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_weights_default_to_equal_shares_and_the_task_stays():
    student, teacher = toys.ConvNet(), toys.ConvNet()
    manager = start(student, teacher, layers("conv1", "conv2"))
    output = student(IMAGES)
    total = manager.on_after_compute_loss(IMAGES, output, output.mean() * 0 + 7.0)
    values = published(manager)
    terms = [values[f"loss/distillation/MSE/{name}"] for name in ("conv1", "conv2")]
    assert total.item() == pytest.approx(7.0 + sum(terms) / 2, rel=1e-5)


def test_every_layer_that_a_glob_matches_is_compared_with_the_weight_of_its_mapping():
    manager = start(toys.ConvNet(), toys.ConvNet(), layers("conv*", "conv1"))
    total = loss_of(manager)
    values = published(manager)
    terms = [values[f"loss/distillation/MSE/{name}"] for name in ("conv1", "conv2", "conv1_2")]
    assert terms[0] == terms[2]
    assert total.item() == pytest.approx(sum(terms) / 2, rel=1e-5)


def test_without_the_origin_loss_the_task_is_left_out():
    manager = start(toys.ConvNet(), toys.ConvNet(), layers("conv1", add_origin_loss=False))
    output = manager.model(IMAGES)
    total = manager.on_after_compute_loss(IMAGES, output, output.mean() * 0 + 7.0)
    assert total.item() == pytest.approx(published(manager)["loss/distillation/MSE/conv1"])


def test_soft_targets_beside_a_layer_weigh_the_task():
    soft = DistillationConfig(toys.ConvNet(), KnowledgeDistillationLossConfig(2, ("CE", "KL")))
    hint = DistillationConfig(soft.teacher_model, layers("conv1"), name="hint")
    for configs in ([soft, hint], [hint, soft]):
        manager = begin(prepare_compression(toys.ConvNet(), configs))
        output = manager.model(IMAGES)
        total = manager.on_after_compute_loss(IMAGES, output, output.mean() * 0 + 8.0)
        values = published(manager)
        terms = 0.5 * values["loss/distillation/KL"] + values["loss/hint/MSE/conv1"]
        assert total.item() == pytest.approx(0.5 * 8.0 + terms, rel=1e-5)
        manager.close()


def test_criteria_that_weigh_the_task_otherwise_are_refused():
    soft = DistillationConfig(toys.ConvNet(), KnowledgeDistillationLossConfig(2, ("CE", "KL")))
    alone = layers("conv1", add_origin_loss=False)
    hint = DistillationConfig(soft.teacher_model, alone, name="hint")
    with pytest.raises(ConfigError, match=r"'distillation' sets 0\.5, 'hint' sets 0\.0"):
        prepare_compression(toys.ConvNet(), [soft, hint])


def test_the_whole_model_and_parts_of_outputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, input):
            hidden = self.inner(input)
            return {"hidden": hidden, "both": (hidden, 2 * hidden)}

    student, teacher = Pair(), Pair()
    criterion = layers(
        [["", "hidden"], ["", lambda output: output["both"][1]]],
        [["inner"], ["", "hidden"]],
    )
    inputs = toys.vectors(8).tensors[0]
    manager = start(student, teacher, criterion)
    output = student(inputs)
    manager.on_after_compute_loss(inputs, output, output["hidden"].mean() * 0)
    mine, theirs = (model.inner(inputs).detach().double().numpy() for model in (student, teacher))
    values = published(manager)
    assert values["loss/distillation/MSE/output"] == pytest.approx(
        np.mean((mine - 2 * theirs) ** 2), rel=1e-5
    )
    assert values["loss/distillation/MSE/inner"] == pytest.approx(
        np.mean((mine - theirs) ** 2), rel=1e-5
    )


@pytest.mark.parametrize("index", [0, 1])
def test_an_element_of_a_tuple_is_picked(index):
    student, teacher = (nn.LSTM(6, 4) for _ in range(2))
    inputs = torch.randn(3, 2, 6)
    pick = 0 if index == 0 else lambda output: output[1][0]
    models = [nn.ModuleDict({"lstm": model}) for model in (student, teacher)]
    for model in models:
        model.forward = lambda input, model=model: model["lstm"](input)[0]
    manager = start(*models, layers([["lstm", pick]]))
    loss_of(manager, inputs)
    (mine, hidden), (theirs, theirs_hidden) = student(inputs), teacher(inputs)
    pair = (mine, theirs) if index == 0 else (hidden[0], theirs_hidden[0])
    assert published(manager)["loss/distillation/MSE/lstm"] == pytest.approx(
        F.mse_loss(*pair).item(), rel=1e-5
    )


@pytest.mark.parametrize("early", [True, False])
def test_a_projection_bridges_widths_and_is_trained(early):
    torch.manual_seed(0)
    student, teacher = toys.ConvNet(4), toys.ConvNet(6)
    arguments = {"example_inputs": IMAGES[:2]} if early else {}
    manager = start(student, teacher, layers("conv1"), **arguments)
    optimizer = manager._context.tracked["optimizer"]
    assert len(optimizer.param_groups) == (2 if early else 1)
    loss = loss_of(manager)
    assert optimizer.param_groups[1]["name"] == "distillation"
    weight, bias = optimizer.param_groups[1]["params"]
    projected = (
        np.einsum("oi,nihw->nohw", weight.detach().double().numpy()[:, :, 0, 0], conv1_of(student))
        + bias.detach().double().numpy()[:, None, None]
    )
    expected = np.mean((projected - conv1_of(teacher)) ** 2)
    assert published(manager)["loss/distillation/MSE/conv1"] == pytest.approx(expected, rel=1e-4)
    before = weight.detach().clone()
    loss.backward()
    manager.on_before_optimizer_step()
    optimizer.step()
    assert not torch.equal(weight, before)
    manager.on_step_end()
    manager.close()
    assert len(optimizer.param_groups) == 1


def test_a_projection_that_a_checkpoint_knows_not_leaves_the_optimizer():
    student, teacher = toys.ConvNet(4), toys.ConvNet(6)
    config = DistillationConfig(teacher, layers("conv1"))
    state = copy.deepcopy(prepare_compression(student, [config]).state_dict())  # Before any loss.
    model = toys.ConvNet(4)
    manager = prepare_compression(model, [config], example_inputs=IMAGES[:2])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    manager.track(optimizer=optimizer)
    first, _ = optimizer.param_groups[1]["params"]
    manager._plugins[0].load_state_dict(state["plugins"]["distillation"])
    assert len(optimizer.param_groups) == 1
    loss_of(begin(manager))
    assert len(optimizer.param_groups) == 2
    assert optimizer.param_groups[1]["params"][0] is not first


def test_a_projection_has_the_precision_of_the_student():
    def training():
        torch.manual_seed(0)
        student, teacher = toys.mlp().double(), toys.mlp(hidden=11).double()
        return start(student, teacher, layers("0"))

    def projection(manager):
        return dict(manager._plugins[0]._running.parameters())

    manager, resumed = training(), training()
    loss_of(manager, toys.vectors(8).tensors[0].double()).backward()
    parameters = projection(manager)
    for parameter in parameters.values():
        assert parameter.dtype == parameter.grad.dtype == torch.float64
        with torch.no_grad():
            parameter.mul_(1 / 3)  # float32 holds none of these
    resumed._plugins[0].load_state_dict(copy.deepcopy(manager._plugins[0].state_dict()))
    for name, parameter in projection(resumed).items():
        assert parameter.dtype == torch.float64
        assert torch.equal(parameter, parameters[name])


def test_a_projection_needs_a_tracked_optimizer():
    student = toys.ConvNet(4)
    manager = prepare_compression(student, [DistillationConfig(toys.ConvNet(6), layers("conv1"))])
    loss_of(begin(manager)).backward()
    with pytest.raises(LifecycleError, match=r"'distillation' created 2 parameters.*no optimizer"):
        manager.on_before_optimizer_step()


@pytest.mark.parametrize(
    ("loss", "projected"),
    [
        ("attention_transfer", False),
        ("similarity_preserving", False),
        ("rkd_distance", False),
        ("rkd_angle", False),
        ("L1", True),
        ("KL", True),
    ],
)
def test_only_losses_that_compare_channels_get_a_projection(loss, projected):
    criterion = layers("conv1", loss_types=loss, class_dimension=1)
    manager = start(toys.ConvNet(4), toys.ConvNet(6), criterion)
    total = loss_of(manager)
    assert total.requires_grad
    assert total.item() > 0
    assert projected == (len(manager._context.tracked["optimizer"].param_groups) == 2)


def test_a_temperature_reaches_the_losses_that_know_one():
    student, teacher = toys.ConvNet(), toys.ConvNet()
    criterion = layers("fc", loss_types="KL", temperature=4.0)
    manager = start(student, teacher, criterion)
    output = student(IMAGES)
    manager.on_after_compute_loss(IMAGES, output, output.mean() * 0)
    with torch.no_grad():
        expected = kd_loss(output, teacher.eval()(IMAGES), 4.0).item()
    assert published(manager)["loss/distillation/KL/fc"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="temperature must be a finite number above 0"):
        layers("fc", temperature=0)


def test_projection_none_refuses_other_shapes():
    criterion = layers("conv1", projection="none")
    with pytest.raises(
        ConfigError,
        match=r"^distillation\.criterion\.layer_mappings\[0\]: 'conv1' and 'conv1' have shapes .* "
        "projection='none'",
    ):
        prepare_compression(
            toys.ConvNet(4),
            [DistillationConfig(toys.ConvNet(6), criterion)],
            example_inputs=IMAGES[:2],
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_types": "attention_transfer"}, r"attention transfer needs \(N, channels, \*\)"),
        (
            {"loss_types": "KL", "loss_options": {"label_smoothing": 2}},
            "must be from 0 to 1, got 2",
        ),
        (
            {"loss_types": "contrastive", "temperature": AdaptiveSchedule(1, 2)},
            "one number for all, which AdaptiveSchedule is not",
        ),
        (
            {"loss_types": "rkd_angle", "loss_weights": AdaptiveSchedule(1, 2)},
            "AdaptiveSchedule follows the teacher's logits",
        ),
    ],
)
@pytest.mark.parametrize("early", [True, False])
def test_a_loss_that_cannot_be_computed_names_its_mapping(options, message, early):
    """At prepare, if there are example inputs."""
    arguments = {"example_inputs": IMAGES[:2]} if early else {}
    criterion = layers("fc", **options)
    where = r"^distillation\.criterion\.layer_mappings\[0\]: .*"

    def prepare():
        return prepare_compression(
            toys.ConvNet(), [DistillationConfig(toys.ConvNet(), criterion)], **arguments
        )

    with pytest.raises(ConfigError, match=where + message):
        prepare() if early else loss_of(begin(prepare()))


def test_images_have_no_classes_that_a_weight_could_follow():
    criterion = layers("conv1", loss_weights=AdaptiveSchedule(1, 2))
    with pytest.raises(ConfigError, match="AdaptiveSchedule follows the teacher's logits"):
        start(toys.ConvNet(), toys.ConvNet(), criterion, example_inputs=IMAGES[:2])


def test_losses_without_temperature_stand_beside_a_scheduled_one():
    torch.manual_seed(0)
    student, teacher = toys.ConvNet(), toys.ConvNet()
    types = ["attention_transfer", "KL"]
    for schedule in (LinearSchedule(4.0, 2.0, 5), AdaptiveSchedule(4.0, 4.0)):
        criterion = layers("conv1", "fc", loss_types=types, temperature=schedule)
        manager = start(student, teacher, criterion)
        loss_of(manager)
        values = published(manager)
        with torch.no_grad():
            expected = kd_loss(student(IMAGES), teacher(IMAGES), 4.0).item()
        assert values["loss/distillation/KL/fc"] == pytest.approx(expected, rel=1e-4)
        assert values["loss/distillation/attention_transfer/conv1"] > 0
        manager.close()


def test_a_weight_schedule_moves_with_the_steps():
    criterion = layers("conv1", loss_weights=LinearSchedule(2.0, 0.0, 2))
    manager = start(toys.ConvNet(), toys.ConvNet(), criterion)
    for step in range(3):
        if step:
            manager.on_step_begin(step)
        total = loss_of(manager)
        value = published(manager)["loss/distillation/MSE/conv1"]
        assert total.item() == pytest.approx((2.0 - step) * value, abs=1e-7)
        total.backward()
        manager.on_before_optimizer_step()
        manager.on_step_end()


class Branched(nn.Module):
    """Calls `unused` never, and `detached` without gradient."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(6, 4)
        self.detached = nn.Linear(6, 4)
        self.used = nn.Linear(6, 4)

    def forward(self, input):
        return self.used(input) + self.detached(input).detach()


@pytest.mark.parametrize("early", [True, False])
def test_a_layer_that_is_never_called_is_named(early):
    inputs = toys.vectors(8).tensors[0]
    arguments = {"example_inputs": inputs} if early else {}
    with pytest.raises(ConfigError, match="student's layer 'unused' was not called"):
        loss_of(start(Branched(), Branched(), layers("unused"), **arguments), inputs)


def test_a_frozen_layer_is_named_with_the_first_loss():
    student = Branched()
    student.used.requires_grad_(False)
    inputs = toys.vectors(8).tensors[0]
    manager = start(student, Branched(), layers("used"), example_inputs=inputs)
    with pytest.raises(ConfigError, match="no gradient reaches the student through 'used'"):
        loss_of(manager, inputs)


def test_what_is_no_feature_is_refused():
    class Indices(nn.Module):
        def forward(self, input):
            return input.argmax(1)

    student = nn.Sequential(nn.Linear(6, 4), Indices(), nn.Embedding(4, 4))
    with pytest.raises(ConfigError, match=r"student's '1' gives a tensor of dtype torch\.int64"):
        prepare_compression(
            student,
            [DistillationConfig(copy.deepcopy(student), layers("1"))],
            example_inputs=toys.vectors(8).tensors[0],
        )


def test_a_part_that_the_whole_model_lacks_is_named():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, input):
            return {"logits": self.inner(input)}

    with pytest.raises(
        ConfigError,
        match=r"the student, output 'logit' returned dict, which holds no 'logit'; choose what is "
        r"meant with \[layer, output\]; did you mean 'logits'",
    ):
        start(
            Named(),
            Named(),
            layers([["", "logit"], ["", "logits"]]),
            example_inputs=toys.vectors(8).tensors[0],
        )


def test_a_function_that_fails_on_the_output_is_named():
    criterion = layers([["conv1", lambda output: output.hidden], "conv1"])
    with pytest.raises(
        ConfigError, match=r"layer_mappings\[0\]: the student's 'conv1', .*failed with .*hidden"
    ):
        start(toys.ConvNet(), toys.ConvNet(), criterion, example_inputs=IMAGES[:2])


def watch(layer, kept):
    layer.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))


def test_features_are_freed_after_each_loss_and_never_kept_outside_of_steps():
    student, teacher = toys.ConvNet(), toys.ConvNet()
    kept = []
    watch(student.conv1, kept)
    watch(teacher.conv1, kept)
    manager = start(student, teacher, layers("conv1"))
    loss = loss_of(manager)
    del loss
    gc.collect()
    assert len(kept) == 2
    assert [reference() for reference in kept] == [None, None]
    student(IMAGES)
    manager.on_step_end()
    gc.collect()
    assert kept[-1]() is None
    manager.on_epoch_end()
    student(IMAGES)
    teacher(IMAGES)
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


def test_features_are_freed_when_the_loss_fails():
    student = toys.ConvNet()
    manager = start(student, toys.ConvNet(), layers("conv1"))
    output = student(IMAGES)
    kept = []
    watch(student.conv1, kept)
    output = student(IMAGES)
    with pytest.raises(Exception, match="not finite"):
        manager.on_after_compute_loss(IMAGES, output, output.mean() * float("nan"))
    del output
    gc.collect()
    assert kept[0]() is None


def test_features_are_freed_when_the_training_fails():
    student = toys.ConvNet()
    kept = []
    watch(student.conv1, kept)
    manager = prepare_compression(student, [DistillationConfig(toys.ConvNet(), layers("conv1"))])
    manager.track(optimizer=torch.optim.SGD(student.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="out of luck"):  # noqa: PT012 (a loop)
        for _ in manager.epochs(1):
            for _ in manager.steps([0]):
                student(IMAGES)
                assert kept[0]() is not None
                raise RuntimeError("out of luck")
    gc.collect()
    assert kept[0]() is None


def test_of_a_layer_that_is_called_twice_the_last_output_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, input):
            return self.inner(self.inner(input))

    torch.manual_seed(0)
    student, teacher, inputs = Twice(), Twice(), toys.vectors(8).tensors[0]
    loss_of(manager := start(student, teacher, layers("inner")), inputs)
    expected = F.mse_loss(student(inputs), teacher(inputs)).item()
    assert published(manager)["loss/distillation/MSE/inner"] == pytest.approx(expected, rel=1e-5)


def test_two_managers_share_a_teacher_and_a_layer_without_disturbing_each_other():
    torch.manual_seed(0)
    teacher = toys.ConvNet()
    students = [toys.ConvNet(), toys.ConvNet()]
    managers = [start(student, teacher, layers("conv1")) for student in students]
    outputs = [student(IMAGES) for student in students]
    for manager, student, output in zip(managers, students, outputs, strict=True):
        manager.on_after_compute_loss(IMAGES, output, output.mean() * 0)
        expected = np.mean((conv1_of(student) - conv1_of(teacher)) ** 2)
        value = published(manager)["loss/distillation/MSE/conv1"]
        assert value == pytest.approx(expected, rel=1e-5)
    managers[0].close()
    managers[1].on_step_end()
    managers[1].on_step_begin(1)
    loss_of(managers[1])
    managers[1].close()
    for model in (teacher, *students):
        assert not any(module._forward_hooks for module in model.modules())


def test_two_criteria_with_one_teacher_run_it_once():
    teacher = CountingTeacher(toys.ConvNet())
    configs = [
        DistillationConfig(teacher, layers(["conv1", "inner.conv1"]), name="first"),
        DistillationConfig(teacher, layers(["conv2", "inner.conv2"]), name="second"),
    ]
    student = toys.ConvNet()
    manager = begin(prepare_compression(student, configs))
    loss_of(manager)
    assert len(teacher.calls) == 1
    values = published(manager)
    assert {"loss/first/MSE/conv1", "loss/second/MSE/conv2"} <= set(values)


def test_a_teacher_of_transformer_layers_calls_the_layers_that_are_watched():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    student = nn.Sequential(layer)
    teacher = copy.deepcopy(student)
    inputs = torch.randn(3, 5, 8)
    criterion = layers("0.linear1", "0.self_attn", loss_types="MSE")
    manager = start(student, teacher, criterion)
    loss_of(manager, inputs)
    assert published(manager)["loss/distillation/MSE/0.linear1"] == pytest.approx(0, abs=1e-10)
    manager.close()
    assert teacher[0].activation_relu_or_gelu == layer.activation_relu_or_gelu == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_manager_that_closes_leaves_the_other_its_teachers_layers(order):
    teacher = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))
    inputs, managers = torch.randn(3, 5, 8), []
    for student in (copy.deepcopy(teacher), copy.deepcopy(teacher)):
        managers.append(start(student, teacher, layers("0.linear1")))
    managers[order[0]].close()
    loss_of(managers[order[1]], inputs)
    managers[order[1]].close()
    assert teacher[0].activation_relu_or_gelu == 1


def test_two_managers_on_one_student_do_not_disturb_each_other():
    torch.manual_seed(0)
    student, teachers = toys.ConvNet(), [toys.ConvNet(), toys.ConvNet(6)]
    first = start(student, teachers[0], layers("conv1", loss_weights=1.0))
    second = start(student, teachers[1], layers("conv1", "conv2"))
    optimizer = first._context.tracked["optimizer"]
    second.track(optimizer=optimizer)
    output = student(IMAGES)
    loss = first.on_after_compute_loss(IMAGES, output, output.mean() * 0)
    expected = np.mean((conv1_of(student) - conv1_of(teachers[0])) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    both = second.on_after_compute_loss(IMAGES, output, loss)
    both.backward()
    names = {"MSE/conv1", "MSE/conv2"}
    own = {f"loss/distillation/{name}" for name in names}
    values = published(second)
    assert own <= set(values)
    terms = sum(values[name] for name in own) / 2
    assert both.item() == pytest.approx(loss.item() + terms, rel=1e-5)
    assert [group.get("name") for group in optimizer.param_groups] == [None, "distillation"]
    first.close()
    for step in (1, 2):
        second.on_before_optimizer_step()
        optimizer.step()
        second.on_step_end()
        second.on_step_begin(step)
        loss_of(second).backward()
    second.close()
    assert len(optimizer.param_groups) == 1
    assert not any(module._forward_hooks for module in student.modules())


def test_taps_follow_a_model_that_quantization_changes():
    """Neural Compressor loses the hook of a convolution that is fused with BatchNorm."""
    torch.manual_seed(0)
    student, teacher = toys.ConvNet(4), toys.ConvNet(6)
    manager = start(
        student, teacher, layers("conv1", "conv2"), QATConfig(), example_inputs=IMAGES[:2]
    )
    optimizer = manager._context.tracked["optimizer"]
    for step in range(3):
        if step:
            manager.on_step_begin(step)
        loss_of(manager).backward()
        manager.on_before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        manager.on_step_end()
    int8 = manager.convert()
    assert not any(module._forward_hooks for module in int8.modules())
    assert "Projection" not in str(int8)
    assert set(int8.state_dict()) == set(prepare_and_convert(toys.ConvNet(4)).state_dict())


def prepare_and_convert(student):
    manager = prepare_compression(student, [QATConfig()])
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    begin(manager)
    for step in range(3):
        if step:
            manager.on_step_begin(step)
        loss_of(manager).backward()
        manager.on_before_optimizer_step()
        optimizer.step()
        manager.on_step_end()
    return manager.convert()


def test_a_compiled_student_is_watched_as_well():
    torch.manual_seed(0)
    student, teacher = toys.ConvNet(), toys.ConvNet()
    manager = start(student, teacher, layers("conv1"))
    compiled = torch.compile(student, backend="eager")
    output = compiled(IMAGES)
    manager.on_after_compute_loss(IMAGES, output, output.mean() * 0).backward()
    expected = np.mean((conv1_of(student) - conv1_of(teacher)) ** 2)
    assert published(manager)["loss/distillation/MSE/conv1"] == pytest.approx(expected, rel=1e-5)
    assert student.conv1.weight.grad is not None


def test_features_of_the_pass_that_returned_the_output_are_compared():
    torch.manual_seed(0)
    student, teacher = toys.ConvNet(), toys.ConvNet()
    manager = start(student, teacher, layers("conv1"))
    output, other = student(IMAGES), student(IMAGES + 1)
    with torch.no_grad():
        student(IMAGES - 1)
    loss = manager.on_after_compute_loss(IMAGES, output, (output.mean() + other.mean()) * 0)
    expected = np.mean((conv1_of(student) - conv1_of(teacher)) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.conv1.weight.grad.norm() > 0


def test_activation_checkpointing_keeps_the_gradient():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
            self.head = nn.Linear(8, 4)

        def forward(self, input):
            return self.head(checkpoint(self.block, input, use_reentrant=False))

    torch.manual_seed(0)
    student, teacher, inputs = Checkpointed(), Checkpointed(), toys.vectors(8).tensors[0]
    manager = start(student, teacher, layers("block.0", loss_weights=1.0))
    loss_of(manager, inputs).backward()
    gradient = student.block[0].weight.grad.clone()
    student.zero_grad()
    F.mse_loss(student.block[0](inputs), teacher.block[0](inputs)).backward()
    torch.testing.assert_close(gradient, student.block[0].weight.grad)


def test_a_caller_cannot_pass_layers():
    with pytest.raises(ConfigError, match="watches the teacher's layers, which the loop cannot"):
        DistillationConfig(criterion=layers("conv1"), teacher_outputs="caller")
