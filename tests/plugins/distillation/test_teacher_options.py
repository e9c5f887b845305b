"""How the plugin runs its teacher: precision, memory format, and what is shared."""

import copy

import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError, prepare_compression
from compression_plugins import (
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    TeacherRuntime,
)
from compression_plugins.distillation.losses import kd_loss
from compression_plugins.distillation.teachers import runtime as runtime_module
from toy_teachers import CountingTeacher, begin, criterion, published

IMAGES = toys.images(8).tensors[0]
BF16 = TeacherRuntime("bfloat16")


def loss_of(manager):
    output = manager.model(IMAGES)
    manager.on_after_compute_loss(IMAGES, output, output.mean() * 0)
    return output


@pytest.mark.parametrize(
    "runtime", [BF16, TeacherRuntime("int8"), TeacherRuntime(channels_last=True)], ids=str
)
def test_the_loss_is_near_the_exact_one_and_the_teacher_stays_as_it_is(runtime):
    torch.manual_seed(0)
    teacher, student = toys.ConvNet(6), toys.ConvNet(4)
    before = copy.deepcopy(teacher.state_dict())
    config = DistillationConfig(teacher, criterion("KL", 2.0), teacher_runtime=runtime)
    manager = begin(prepare_compression(student, [config]))
    output = loss_of(manager)
    with torch.no_grad():
        exact = kd_loss(output, teacher.eval()(IMAGES), 2.0)
    value = published(manager)["loss/distillation/KL"]
    assert value == pytest.approx(exact.item(), rel=0.05)
    if runtime.precision != "float32":
        assert value != exact.item()
    manager.close()
    toys.assert_identical(teacher.state_dict(), before)


def test_the_hash_in_checkpoints_is_the_original_teachers():
    teacher = toys.ConvNet(6)
    plain, fast = (
        prepare_compression(toys.ConvNet(), [DistillationConfig(teacher, teacher_runtime=runtime)])
        for runtime in (TeacherRuntime(), BF16)
    )
    states = [manager.state_dict()["plugins"]["distillation"] for manager in (plain, fast)]
    assert states[0] == states[1]


def test_layers_of_a_converted_copy_are_watched():
    torch.manual_seed(0)
    teacher, student = toys.ConvNet(6), toys.ConvNet(4)
    config = DistillationConfig(
        teacher,
        IntermediateLayersKnowledgeDistillationLossConfig(["conv1"], "attention_transfer"),
        teacher_runtime=BF16,
    )
    manager = begin(prepare_compression(student, [config]))
    loss_of(manager)
    assert 0 < published(manager)["loss/distillation/attention_transfer/conv1"] < 1
    assert not teacher.conv1._forward_hooks


@pytest.mark.parametrize(
    ("runtimes", "calls"),
    [((TeacherRuntime(), TeacherRuntime()), 1), ((BF16, BF16), 1), ((BF16, TeacherRuntime()), 2)],
)
def test_instances_share_a_run_only_with_the_same_runtime(runtimes, calls):
    shared: list[int] = []

    class Counted(CountingTeacher):
        def forward(self, *args, **kwargs):
            shared.append(1)
            return super().forward(*args, **kwargs)

    teacher = Counted(toys.ConvNet(6))
    configs = [
        DistillationConfig(teacher, criterion(), teacher_runtime=runtime, name=f"d{index}")
        for index, runtime in enumerate(runtimes)
    ]
    loss_of(begin(prepare_compression(toys.ConvNet(), configs)))
    assert len(shared) == calls


def test_a_copy_whose_layers_are_watched_runs_itself():
    teacher = toys.ConvNet(6)
    layers = IntermediateLayersKnowledgeDistillationLossConfig(["conv1"], "attention_transfer")
    configs = [
        DistillationConfig(teacher, criterion("KL", weights=(1.0, 1.0)), teacher_runtime=BF16),
        DistillationConfig(teacher, layers, teacher_runtime=BF16, name="layers"),
    ]
    manager = begin(prepare_compression(toys.ConvNet(), configs))
    loss_of(manager)
    assert published(manager)["loss/layers/attention_transfer/conv1"] > 0


def test_from_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "plugins: {distillation: {teacher_runtime: {precision: bfloat16, channels_last: true}}}"
    )
    manager = prepare_compression(toys.ConvNet(), recipe, teacher_model=toys.ConvNet())
    assert manager._plugins[0].config.teacher_runtime == TeacherRuntime("bfloat16", False, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_model": nn.Linear(2, 2), "teacher_runtime": "bfloat16"}, "of type TeacherRunt"),
        ({"teacher_outputs": "caller", "teacher_runtime": BF16}, "no use without teacher_model"),
        ({"teacher_outputs": "ema", "teacher_runtime": BF16}, "no use without teacher_model"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=f"DistillationConfig.teacher_runtime.*{message}"):
        DistillationConfig(**options)


@pytest.mark.parametrize("computes", [True, False])
@pytest.mark.parametrize("runtime", [BF16, TeacherRuntime()], ids=str)
def test_the_report_says_where_bfloat16_is_emulated(monkeypatch, computes, runtime):
    monkeypatch.setattr(runtime_module, "_cpu_computes_bfloat16", lambda: computes)
    config = DistillationConfig(toys.ConvNet(6), teacher_runtime=runtime)
    manager = prepare_compression(toys.ConvNet(4), [config], example_inputs=IMAGES)
    is_told = "no bfloat16 instructions" in str(manager.report())
    assert is_told == (runtime == BF16 and not computes)
    manager.close()
