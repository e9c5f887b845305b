"""Which dimension of an output holds the classes, and outputs that have none."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distillation_loss_reference as reference
import toys
from compression_manager import ConfigError, prepare_compression
from compression_plugins import (
    AdaptiveSchedule,
    DistillationConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    SelfKnowledgeDistillationLossConfig,
    TeacherCache,
    TokenDistillationLossConfig,
)
from toy_teachers import begin

CLASSES = 3
IMAGES = (2, CLASSES, 4, 5)
PER_POSITION = {
    "KL": reference.kl,
    "CE": reference.cross_entropy,
    "reverse_KL": reference.reverse_kl,
    "JS": reference.jensen_shannon,
    "DKD": lambda s, t, target: reference.decoupled(s, t, target, 1.0, 8.0),
}
WITH_SOFTMAX = [*PER_POSITION, "DIST"]


def outputs(shape=IMAGES):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    return draw[0].requires_grad_(), draw[1]


def labels(shape=IMAGES):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CLASSES, (shape[0], *shape[2:]), generator=generator)


def criterion(loss, temperature=1.0, weights=(0.0, 1.0), **options):
    return KnowledgeDistillationLossConfig(temperature, ("CE", loss), weights, **options)


def loss_of(config, student, teacher, **arguments):
    """Return the loss of one call, which gets both outputs from the loop."""
    config = DistillationConfig(criterion=config, teacher_outputs="caller")
    manager = begin(prepare_compression(toys.mlp(), [config]))
    loss = manager.on_after_compute_loss(
        student.detach(), student, student.sum() * 0.0, teacher, **arguments
    )
    manager.close()
    return loss


def expected(loss, student, teacher, temperature):
    """The loss of images (N, classes, H, W) in float64, pixel by pixel."""
    student, teacher = (np.transpose(item, (0, 2, 3, 1)) for item in (student, teacher))
    if loss == "DIST":
        return reference.dist(student, teacher, 1.0, 1.0, temperature)
    more = [labels().numpy()] if loss == "DKD" else []
    return reference.batch_mean(PER_POSITION[loss], student, teacher, temperature, *more)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("loss", WITH_SOFTMAX)
def test_images_have_a_distribution_for_each_pixel(loss, temperature):
    student, teacher = outputs()
    value = loss_of(
        criterion(loss, temperature, class_dimension=1), student, teacher, target=labels()
    )
    before, of_teacher = student.detach().numpy(), teacher.numpy()
    exact = expected(loss, before, of_teacher, temperature)
    np.testing.assert_allclose(value.item(), exact, rtol=1e-6)

    (gradient,) = torch.autograd.grad(value, student)
    for place in ((0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 2, 1)):
        step = np.zeros(IMAGES)
        step[place] = 1e-5
        ends = [
            expected(loss, before + sign * step, of_teacher, temperature) for sign in (1.0, -1.0)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradient[place].item(), slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("shape", [(4, CLASSES), (4, 6, CLASSES)])
@pytest.mark.parametrize("class_dimension", [None, -1])
def test_the_last_dimension_of_two_or_three_holds_the_classes(shape, class_dimension):
    student, teacher = outputs(shape)
    value = loss_of(criterion("KL", class_dimension=class_dimension), student, teacher)
    exact = reference.batch_mean(reference.kl, student.detach().numpy(), teacher.numpy(), 1.0)
    np.testing.assert_allclose(value.item(), exact, rtol=1e-6)


@pytest.mark.parametrize("loss", WITH_SOFTMAX)
@pytest.mark.parametrize("shape", [IMAGES, (2, 4, 5, CLASSES), (2, CLASSES, 2, 4, 5)])
def test_images_are_refused_until_their_classes_are_named(loss, shape):
    shown = re.escape(f"of shape {shape}")
    message = (
        rf"^distillation\.criterion\.class_dimension: '{loss}' .*{shown} "
        r".*class_dimension=1 for images \(N, classes, height, width\)"
    )
    with pytest.raises(ConfigError, match=message):
        loss_of(criterion(loss), *outputs(shape), target=labels())


@pytest.mark.parametrize("loss", WITH_SOFTMAX)
@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 4, 1)])
def test_outputs_without_classes_are_refused_with_advice(loss, shape):
    message = rf"criterion\.loss_types\[1\]: .*shape \({shape[0]}, ?.*choose the loss 'MSE'"
    with pytest.raises(ConfigError, match=message):
        loss_of(criterion(loss), *outputs(shape), target=torch.zeros(8, dtype=torch.long))


@pytest.mark.parametrize("shape", [(8,), (8, 1), IMAGES])
def test_numbers_are_learned_with_mse(shape):
    student, teacher = outputs(shape)
    value = loss_of(criterion("MSE"), student, teacher)
    torch.testing.assert_close(value, F.mse_loss(student, teacher))


@pytest.mark.parametrize("shape", [IMAGES, (8,)])
def test_a_weight_does_not_follow_classes_that_are_not_known(shape):
    adaptive = criterion("MSE", weights=(0.0, AdaptiveSchedule(1.0, 2.0)))
    with pytest.raises(ConfigError, match="AdaptiveSchedule follows the teacher's logits"):
        loss_of(adaptive, *outputs(shape))


@pytest.mark.parametrize("by", ["confidence", "entropy"])
def test_each_pixel_has_its_own_temperature(by):
    student, teacher = outputs()
    schedule = AdaptiveSchedule(1.0, 3.0, by)
    value = loss_of(criterion("KL", schedule, class_dimension=1), student, teacher)
    rows = [item.permute(0, 2, 3, 1).detach().numpy() for item in (student, teacher)]
    temperatures = schedule.value(0, torch.from_numpy(rows[1])).numpy()
    exact = reference.batch_mean(reference.kl, *rows, temperatures)
    np.testing.assert_allclose(value.item(), exact, rtol=1e-6)


@pytest.mark.parametrize("class_dimension", [1, -2])
def test_tokens_may_have_their_vocabulary_elsewhere(class_dimension):
    shape = (2, CLASSES, 5)
    student, teacher = outputs(shape)
    counted = torch.ones(2, 5)
    options = {"loss_weights": (0.0, 1.0), "chunk_size": 2}
    moved = loss_of(
        TokenDistillationLossConfig(class_dimension=class_dimension, **options),
        student,
        teacher,
        mask=counted,
    )
    usual = loss_of(
        TokenDistillationLossConfig(**options), student.mT, teacher.mT.contiguous(), mask=counted
    )
    torch.testing.assert_close(moved, usual)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (moved, usual)]
    torch.testing.assert_close(*gradients)


def test_a_vocabulary_of_one_token_is_refused():
    with pytest.raises(ConfigError, match=r"'forward_kl' .*a single class"):
        loss_of(TokenDistillationLossConfig(), *outputs((2, 5, 1)), mask=torch.ones(2, 5))


@pytest.mark.parametrize("class_dimension", [2, -2, -3])
def test_a_dimension_that_the_output_lacks_is_named(class_dimension):
    message = rf"class_dimension is {class_dimension}, which an output of shape \(4, 3\) does not"
    with pytest.raises(ConfigError, match=message):
        loss_of(criterion("MSE", class_dimension=class_dimension), *outputs((4, 3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda value: KnowledgeDistillationLossConfig(class_dimension=value),
        lambda value: TokenDistillationLossConfig(class_dimension=value),
        lambda value: IntermediateLayersKnowledgeDistillationLossConfig(
            ["0"], class_dimension=value
        ),
        lambda value: SelfKnowledgeDistillationLossConfig([[["0", "2"]]], class_dimension=value),
    ],
)
@pytest.mark.parametrize(
    ("value", "message"), [(0, "is 0, which is the batch"), ("1", "must be an integer")]
)
def test_what_is_no_dimension_is_refused_at_once(make, value, message):
    with pytest.raises(ConfigError, match=rf"class_dimension {message}"):
        make(value)


# Models ------------------------------------------------------------------------------------------


def segmenter(width, classes=CLASSES):
    """Return a model of images (N, 1, 4, 5) with a class for each pixel."""
    return nn.Sequential(nn.Conv2d(1, width, 1), nn.ReLU(), nn.Conv2d(width, classes, 1))


@pytest.fixture
def pictures():
    torch.manual_seed(0)
    return torch.randn(4, 1, 4, 5)


def step(student, config, inputs, **arguments):
    """Return the loss without the task's own, which is 0."""
    manager = begin(prepare_compression(student, [config], example_inputs=inputs))
    output = student(inputs)
    loss = manager.on_after_compute_loss(inputs, output, output.sum() * 0.0, **arguments)
    manager.close()
    return loss


def cached(directory, teacher, inputs, **options):
    cache = TeacherCache(directory, **options)
    cache.build(teacher, [(inputs, None, torch.arange(len(inputs)))])
    return cache


def pixelwise_kl(student, teacher):
    rows = [item.detach().double().permute(0, 2, 3, 1).numpy() for item in (student, teacher)]
    return reference.batch_mean(reference.kl, *rows, 1.0)


def test_images_are_refused_at_prepare_with_example_inputs(pictures):
    with pytest.raises(ConfigError, match="class_dimension=1 for images"):
        prepare_compression(
            segmenter(2),
            [DistillationConfig(segmenter(4), criterion("KL"))],
            example_inputs=pictures,
        )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_cached_teacher_has_the_same_order(tmp_path, pictures, dtype):
    student, teacher = segmenter(2), segmenter(4)
    cache = cached(tmp_path / "cache", teacher, pictures, dtype=dtype)
    config = DistillationConfig(criterion=criterion("KL", class_dimension=1), teacher_cache=cache)
    value = step(student, config, pictures, sample_ids=torch.arange(4))
    exact = pixelwise_kl(student(pictures), cache.lookup(torch.arange(4)))
    np.testing.assert_allclose(value.item(), exact, rtol=1e-5)


def test_images_may_have_another_size_than_those_of_the_cache(tmp_path, pictures):
    cache = cached(tmp_path / "cache", segmenter(4), pictures)
    config = DistillationConfig(criterion=criterion("KL", class_dimension=1), teacher_cache=cache)
    prepare_compression(segmenter(2), [config], example_inputs=torch.randn(2, 1, 6, 7)).close()


def test_a_cache_of_other_classes_is_refused_at_prepare(tmp_path, pictures):
    cache = cached(tmp_path / "cache", segmenter(4, classes=7), pictures)
    config = DistillationConfig(criterion=criterion("KL", class_dimension=1), teacher_cache=cache)
    with pytest.raises(ConfigError, match=r"differ in their classes: \(4, 4, 5, 3\) and .* 7\)"):
        prepare_compression(segmenter(2), [config], example_inputs=pictures)


def test_a_recipe_says_where_the_classes_are(tmp_path, pictures):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "plugins: {distillation: {criterion: {type: knowledge_distillation, class_dimension: 1, "
        "loss_types: [CE, KL], loss_weights: [0.0, 1.0]}}}"
    )
    student, teacher = segmenter(2), segmenter(4)
    manager = begin(prepare_compression(student, recipe, teacher_model=teacher))
    output = student(pictures)
    value = manager.on_after_compute_loss(pictures, output, output.sum() * 0.0)
    np.testing.assert_allclose(value.item(), pixelwise_kl(output, teacher(pictures)), rtol=1e-5)
    manager.close()


def test_layers_of_images_have_their_classes_in_the_same_dimension(pictures):
    student, teacher = segmenter(2), segmenter(4)

    def layers(**options):
        config = IntermediateLayersKnowledgeDistillationLossConfig(["2"], "KL", **options)
        return DistillationConfig(teacher, config)

    with pytest.raises(ConfigError, match=r"class_dimension: .*shape \(4, 3, 4, 5\)"):
        step(student, layers(), pictures)
    value = step(student, layers(class_dimension=1), pictures)
    exact = pixelwise_kl(student(pictures), teacher(pictures))
    np.testing.assert_allclose(value.item(), exact, rtol=1e-5)


def test_self_distillation_of_images_needs_it_too(pictures):
    student = nn.Sequential(nn.Conv2d(1, CLASSES, 1), nn.Conv2d(CLASSES, CLASSES, 1))

    def itself(**options):
        config = SelfKnowledgeDistillationLossConfig([[["0", "1"]]], "KL", **options)
        return DistillationConfig(criterion=config)

    with pytest.raises(ConfigError, match="class_dimension=1 for images"):
        step(student, itself(), pictures)
    value = step(student, itself(class_dimension=1), pictures)
    exact = pixelwise_kl(student[0](pictures), student(pictures))
    np.testing.assert_allclose(value.item(), exact, rtol=1e-5)
