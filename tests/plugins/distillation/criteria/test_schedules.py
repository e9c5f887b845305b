"""Temperatures and weights over time, and by the teacher's certainty."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import toys
from compression_manager import ConfigError, prepare_compression
from compression_plugins import (
    AdaptiveSchedule,
    CosineSchedule,
    CurriculumSchedule,
    DistillationConfig,
    KnowledgeDistillationLossConfig,
    LinearSchedule,
)
from compression_plugins.distillation.criteria.schedules import weight_at
from toy_teachers import published


@pytest.mark.parametrize(("step", "share"), [(0, 0), (10, 0), (15, 0.5), (20, 1), (999, 1)])
def test_linear_goes_from_start_to_end_after_its_beginning(step, share):
    schedule = LinearSchedule(start=8.0, end=2.0, steps=10, begin=10)
    assert schedule.value(step, None) == 8.0 - 6.0 * share


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 8.0), (1, 8.0 - 6.0 * (1 - math.cos(math.pi / 4)) / 2), (2, 5.0), (4, 2.0)],
)
def test_cosine_is_half_a_period(step, value):
    assert CosineSchedule(start=8.0, end=2.0, steps=4).value(step, None) == pytest.approx(value)


@pytest.mark.parametrize(("step", "value"), [(0, 8), (9, 8), (10, 4), (19, 4), (20, 1), (50, 1)])
def test_curriculum_has_stages(step, value):
    assert CurriculumSchedule([8, 4, 1], [10, 20]).value(step, None) == value


@settings(max_examples=50, deadline=None)
@given(
    logits=hnp.arrays(np.float32, (3, 5), elements=st.floats(-20, 20, width=32)),
    by=st.sampled_from(["confidence", "entropy"]),
)
def test_adaptive_follows_the_teacher_sample_by_sample(logits, by):
    exact = logits.astype(np.float64)
    probabilities = np.exp(exact - exact.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    if by == "confidence":
        share = (probabilities.max(1) - 1 / 5) / (1 - 1 / 5)
    else:
        share = -(probabilities * np.log(probabilities)).sum(1) / np.log(5)
    value = AdaptiveSchedule(2.0, 6.0, by).value(0, torch.from_numpy(logits))
    np.testing.assert_allclose(value.numpy(), 2.0 + 4.0 * share, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by", ["confidence", "entropy"])
def test_adaptive_computes_in_float32_of_narrower_logits(by, dtype):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    schedule = AdaptiveSchedule(low=1.0, high=3.0, by=by)
    assert torch.equal(schedule.value(0, logits), schedule.value(0, logits.float()))


def test_an_adaptive_weight_is_zero_where_no_position_counts():
    logits, counted = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool)
    assert weight_at(AdaptiveSchedule(1.0, 3.0), 0, logits, counted) == 0.0


def test_adaptive_is_finite_where_a_class_is_impossible():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [1e4, -1e4, 0.0]])
    value = AdaptiveSchedule(0.0, 1.0, "entropy").value(0, logits)
    torch.testing.assert_close(value, torch.tensor([math.log(2) / math.log(3), 0.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearSchedule(-1, 2, 3), "LinearSchedule.start must be a finite number of at"),
        (lambda: LinearSchedule(1, math.nan, 3), "LinearSchedule.end must be a finite number"),
        (lambda: CosineSchedule(1, 2, 0), "CosineSchedule.steps must be an integer of at least 1"),
        (lambda: CosineSchedule(1, 2, 3, -1), "CosineSchedule.begin must be an integer of at leas"),
        (lambda: CurriculumSchedule([1], []), "at least two values"),
        (lambda: CurriculumSchedule([1, 2], [3, 4]), "one boundary less than values"),
        (lambda: CurriculumSchedule([1, 2, 3], [4, 4]), "boundaries must ascend"),
        (lambda: CurriculumSchedule(1, [4]), "CurriculumSchedule.values must be a list, got 1"),
        (lambda: AdaptiveSchedule(1, 2, "entrop"), "by got 'entrop'; did you mean 'entropy'"),
        (lambda: AdaptiveSchedule(1, math.inf), "AdaptiveSchedule.high must be a finite number"),
        (
            lambda: KnowledgeDistillationLossConfig(LinearSchedule(4, 0, 10)),
            "temperature must be a finite number above 0, got 0",
        ),
        (
            lambda: KnowledgeDistillationLossConfig(AdaptiveSchedule(4, 0)),
            "temperature must be a finite number above 0, got 0",
        ),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def kd(student, teacher, temperature):
    """sum of T^2 KL over the batch, float64; the temperature is one number per sample."""
    scale = np.asarray(temperature).reshape(-1, 1)
    parts = []
    for logits in (student, teacher):
        shifted = logits / scale
        shifted = shifted - shifted.max(1, keepdims=True)
        parts.append(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
    divergence = (np.exp(parts[1]) * (parts[1] - parts[0])).sum(1)
    return float((divergence * scale[:, 0] ** 2).mean())


def terms_over_steps(criterion, steps=4):
    """Return (student, teacher logits, the term's value, total) of each step with its hooks."""
    torch.manual_seed(0)
    teacher, model = toys.mlp(), toys.mlp()
    manager = prepare_compression(model, [DistillationConfig(teacher, criterion)])
    inputs = toys.vectors(8).tensors[0]
    seen = []
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for step in range(steps):
        manager.on_step_begin(step)
        output = model(inputs)
        total = manager.on_after_compute_loss(inputs, output, output.mean() * 0)
        total.backward()
        manager.on_before_optimizer_step()
        with torch.no_grad():
            expected = output.double().numpy(), teacher(inputs).double().numpy()
        manager.on_after_optimizer_step()
        value = published(manager)[f"loss/distillation/{criterion.loss_types[1]}"]
        seen.append((*expected, value, total.item()))
        manager.on_step_end()
    return seen


def test_a_scheduled_temperature_is_that_of_the_step():
    schedule = LinearSchedule(8.0, 2.0, 3)
    criterion = KnowledgeDistillationLossConfig(schedule, ("CE", "KL"), (1.0, 0.5))
    seen = terms_over_steps(criterion)
    for temperature, (student, teacher, value, total) in zip([8, 6, 4, 2], seen, strict=True):
        assert value == pytest.approx(kd(student, teacher, [temperature] * 8), rel=1e-4)
        assert total == pytest.approx(0.5 * value, rel=1e-6)


def test_an_adaptive_temperature_is_that_of_each_sample():
    schedule = AdaptiveSchedule(1.0, 5.0, "entropy")
    seen = terms_over_steps(KnowledgeDistillationLossConfig(schedule, ("CE", "KL")), steps=1)
    student, teacher, value, _ = seen[0]
    temperature = schedule.value(0, torch.from_numpy(teacher)).double().numpy()
    assert np.ptp(temperature) > 0.1
    assert value == pytest.approx(kd(student, teacher, temperature), rel=1e-4)


def test_a_scheduled_weight_multiplies_the_term_only():
    criterion = KnowledgeDistillationLossConfig(
        2.0, ("CE", "KL"), (1.0, CosineSchedule(1.0, 0.0, 2))
    )
    for weight, (_, _, value, total) in zip(
        [1.0, 0.5, 0.0, 0.0], terms_over_steps(criterion), strict=True
    ):
        assert total == pytest.approx(weight * value, abs=1e-7)


def test_an_adaptive_weight_is_the_mean_of_the_batch():
    schedule = AdaptiveSchedule(0.0, 2.0)
    criterion = KnowledgeDistillationLossConfig(2.0, ("CE", "KL"), (1.0, schedule))
    _, teacher, value, total = terms_over_steps(criterion, steps=1)[0]
    weight = schedule.value(0, torch.from_numpy(teacher)).mean().item()
    assert total == pytest.approx(weight * value, rel=1e-5)


def test_schedules_in_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "plugins:\n  distillation:\n    criterion:\n      temperature: {type: cosine, start: 8, "
        "end: 2, steps: 100}\n      loss_types: [CE, KL]\n"
        "      loss_weights: [0.5, {type: curriculum, values: [1, 2], boundaries: [5]}]\n"
    )
    manager = prepare_compression(toys.mlp(), recipe, teacher_model=toys.mlp())
    criterion = manager._plugins[0].config.criterion
    assert criterion.temperature == CosineSchedule(8, 2, 100)
    assert criterion.loss_weights == (0.5, CurriculumSchedule((1, 2), (5,)))
    described = manager.state_dict()["recipe"]["plugins"]["distillation"]["criterion"]
    assert described["temperature"] == {
        "type": "cosine", "start": 8, "end": 2, "steps": 100, "begin": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        ("{type: cosin, start: 8}", r"temperature\.type: .*did you mean 'cosine'"),
        ("{type: cosine, start: 8, end: 2}", r"temperature\.steps is required"),
        ("{start: 8, end: 2, steps: 3}", r"temperature\.type: type is missing"),
        ("[4]", r"temperature: expected float or .*got \[4\]"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, temperature, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"plugins: {{distillation: {{criterion: {{temperature: {temperature}}}}}}}")
    with pytest.raises(ConfigError, match=message):
        prepare_compression(toys.mlp(), recipe, teacher_model=toys.mlp())


def test_a_foreign_loss_without_temperature_cannot_follow_a_schedule():
    from compression_manager import Plugin, PluginConfig, hookimpl

    class OwnConfig(PluginConfig):
        plugin = "own_loss"

    class Own(Plugin[OwnConfig]):
        config_class = OwnConfig

        @hookimpl
        def make_distillation_loss(self, name, options):
            return (
                (lambda student, teacher: (student - teacher).abs().mean())
                if name == "own"
                else None
            )

    criterion = KnowledgeDistillationLossConfig(LinearSchedule(8, 2, 3), ("CE", "own"))
    with pytest.raises(ConfigError, match=r"criterion\.temperature: .*'own' takes no temperature"):
        prepare_compression(
            toys.mlp(), [DistillationConfig(toys.mlp(), criterion), Own(OwnConfig())]
        )
