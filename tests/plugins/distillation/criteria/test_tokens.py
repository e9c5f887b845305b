"""Language models: positions that count, accumulation, vocabularies, bounded memory."""

import numpy as np
import pytest
import torch
from torch import nn

from compression_manager import ConfigError, prepare_compression
from compression_plugins import AdaptiveSchedule, DistillationConfig, TokenDistillationLossConfig
from toy_teachers import begin, published

VOCABULARY = 11


class LanguageModel(nn.Module):
    """Returns {"logits": (batch, sequence, vocabulary)}; takes labels as transformers do."""

    def __init__(self, vocabulary=VOCABULARY):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, vocabulary)

    def forward(self, input_ids, labels=None):
        return {"logits": self.head(self.embedding(input_ids))}


def tokens(batch=3, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


def prepared(criterion, student=None, teacher=None):
    torch.manual_seed(0)
    student = student or LanguageModel()
    teacher = teacher or LanguageModel()
    return begin(prepare_compression(student, [DistillationConfig(teacher, criterion)])), teacher


def log_softmax(logits):
    logits = logits.detach().double().numpy()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def forward_kl(student, teacher):
    """KL(teacher || student) of every position."""
    student, teacher = log_softmax(student), log_softmax(teacher)
    return (np.exp(teacher) * (teacher - student)).sum(-1)


def loss_of(manager, inputs, **arguments):
    output = manager.model(**inputs) if isinstance(inputs, dict) else manager.model(inputs)
    task = output["logits"].mean() * 0
    return manager.on_after_compute_loss(inputs, output, task, **arguments), output["logits"]


def test_the_mean_is_over_the_positions_that_count():
    criterion = TokenDistillationLossConfig(loss_weights=[1.0, 0.5])
    manager, teacher = prepared(criterion)
    ids = tokens()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    total, logits = loss_of(manager, ids, mask=mask)
    divergence = forward_kl(logits, teacher(ids)["logits"])
    expected = (divergence * mask.numpy()).sum() / mask.sum().item()
    assert published(manager)["loss/distillation/forward_kl"] == pytest.approx(expected, rel=1e-4)
    assert total.item() == pytest.approx(0.5 * expected, rel=1e-4)


@pytest.mark.parametrize(("shift", "ignored"), [(False, -100), (True, -100), (False, -1)])
@pytest.mark.parametrize("where", ["target", "input"])
def test_labels_say_which_positions_count(shift, ignored, where):
    criterion = TokenDistillationLossConfig(shift=shift, ignore_index=ignored)
    manager, teacher = prepared(criterion)
    ids, labels = tokens(), tokens(seed=1)
    labels[:, -2:] = ignored
    labels[0, 1] = ignored
    inputs = {"input_ids": ids, "labels": labels} if where == "input" else ids
    arguments = {"target": labels} if where == "target" else {}
    _, logits = loss_of(manager, inputs, **arguments)
    counted = labels.numpy() != ignored
    if shift:
        counted = np.concatenate([counted[:, 1:], np.zeros((3, 1), bool)], 1)
    divergence = forward_kl(logits, teacher(ids)["logits"])
    value = published(manager)["loss/distillation/forward_kl"]
    assert value == pytest.approx(divergence[counted].mean(), rel=1e-4)


def test_a_mask_is_taken_as_it_is_and_before_labels():
    manager, teacher = prepared(TokenDistillationLossConfig(shift=True))
    ids = tokens()
    mask = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [1, 1, 0, 1, 1]])
    _, logits = loss_of(manager, ids, mask=mask, target=tokens(seed=1))
    divergence = forward_kl(logits, teacher(ids)["logits"])
    value = published(manager)["loss/distillation/forward_kl"]
    assert value == pytest.approx(divergence[mask.numpy() == 1].mean(), rel=1e-4)


def test_without_mask_and_labels_it_says_what_to_pass():
    manager, _ = prepared(TokenDistillationLossConfig())
    with pytest.raises(ConfigError, match=r"which positions count.*mask=.*target=labels"):
        loss_of(manager, tokens())


def test_accumulated_parts_add_up_to_the_whole_batch():
    ids = tokens(6)
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) > 0.4
    count = int(mask.sum())
    manager, _ = prepared(TokenDistillationLossConfig(loss_weights=[0.0, 1.0]))
    whole, _ = loss_of(manager, ids, mask=mask, num_items=count)
    parts = [
        loss_of(manager, ids[part], mask=mask[part], num_items=count)[0]
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_other_divergences(divergence):
    criterion = TokenDistillationLossConfig(divergence, beta=0.3)
    manager, teacher = prepared(criterion)
    ids = tokens()
    _, logits = loss_of(manager, ids, mask=torch.ones_like(ids))
    student, other = (np.exp(log_softmax(item)) for item in (logits, teacher(ids)["logits"]))

    def kl(p, q):
        return (p * np.log(p / q)).sum(-1)

    if divergence == "reverse_kl":
        expected = kl(student, other)
    else:
        mixture = 0.3 * other + 0.7 * student
        expected = 0.3 * kl(other, mixture) + 0.7 * kl(student, mixture)
    value = published(manager)[f"loss/distillation/{divergence}"]
    assert value == pytest.approx(expected.mean(), rel=1e-3)


def test_chunks_of_the_vocabulary_give_the_same_loss_and_gradient():
    gradients, values = [], []
    for chunk_size in (None, 4):
        criterion = TokenDistillationLossConfig(chunk_size=chunk_size, temperature=2.0)
        manager, _ = prepared(criterion)
        total, _ = loss_of(manager, tokens(), mask=torch.ones(3, 5))
        total.backward()
        values.append(total.item())
        gradients.append(manager.model.head.weight.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    torch.testing.assert_close(*gradients)
    # Only what is computed in chunks has this limit.
    total, _ = loss_of(manager, tokens(), mask=torch.ones(3, 5))
    with pytest.raises(ConfigError, match="chunk_size cannot be differentiated twice"):
        torch.autograd.grad(total, manager.model.head.weight, create_graph=True)


def test_a_temperature_for_each_token():
    schedule = AdaptiveSchedule(1.0, 4.0)
    manager, teacher = prepared(TokenDistillationLossConfig(temperature=schedule))
    ids = tokens()
    _, logits = loss_of(manager, ids, mask=torch.ones_like(ids))
    other = teacher(ids)["logits"]
    temperature = schedule.value(0, other).unsqueeze(-1)
    divergence = forward_kl(logits / temperature, other / temperature)
    expected = (divergence * temperature.squeeze(-1).numpy() ** 2).mean()
    value = published(manager)["loss/distillation/forward_kl"]
    assert value == pytest.approx(expected, rel=1e-4)


class Fixed(nn.Module):
    """Returns the same logits for any input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, input):
        return self.logits


@pytest.mark.parametrize("padding", [0.0, 50.0, float("nan")])
@pytest.mark.parametrize("by", ["confidence", "entropy"])
@pytest.mark.parametrize("what", ["temperature", "loss_weights"])
def test_padding_changes_no_adaptive_temperature_or_weight(what, by, padding):
    schedule = AdaptiveSchedule(1.0, 3.0, by)
    options = {what: schedule if what == "temperature" else (0, schedule)}
    real = torch.randn(2, 2, 4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([real, torch.full((2, 2, 3, VOCABULARY), padding)], 2)
    totals = []
    for student, teacher in (real, padded):
        criterion = TokenDistillationLossConfig(**options)
        manager, _ = prepared(criterion, Fixed(student), Fixed(teacher))
        task = torch.zeros((), requires_grad=True)
        mask = torch.arange(student.shape[1]).expand(2, -1) < 4
        output = manager.model(None)
        totals.append(manager.on_after_compute_loss(None, output, task, mask=mask))
        assert published(manager)["loss/distillation/forward_kl"] > 0
    torch.testing.assert_close(totals[1], totals[0])


def test_another_vocabulary_is_refused_unless_the_common_part_is_chosen():
    wide = LanguageModel(VOCABULARY + 5)
    manager, _ = prepared(TokenDistillationLossConfig(), teacher=wide)
    with pytest.raises(ConfigError, match=r"vocabularies of 11 and 16 .*vocabulary='common'"):
        loss_of(manager, tokens(), mask=torch.ones(3, 5))
    manager, _ = prepared(TokenDistillationLossConfig(vocabulary="common"), teacher=wide)
    ids = tokens()
    _, logits = loss_of(manager, ids, mask=torch.ones_like(ids))
    expected = forward_kl(logits, wide(ids)["logits"][..., :VOCABULARY]).mean()
    value = published(manager)["loss/distillation/forward_kl"]
    assert value == pytest.approx(expected, rel=1e-4)
    manager, teacher = prepared(TokenDistillationLossConfig(vocabulary="common"), student=wide)
    _, logits = loss_of(manager, ids, mask=torch.ones_like(ids))
    expected = forward_kl(logits[..., :VOCABULARY], teacher(ids)["logits"]).mean()
    value = published(manager)["loss/distillation/forward_kl"]
    assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.ones(3, 4)}, r"mask have shape \(3, 4\), the logits' positions \(3, 5\)"),
        ({"target": torch.ones(3)}, r"labels have shape \(3,\)"),
    ],
)
def test_masks_of_another_shape_are_refused(arguments, message):
    manager, _ = prepared(TokenDistillationLossConfig())
    with pytest.raises(ConfigError, match=message):
        loss_of(manager, tokens(), **arguments)


def test_logits_of_one_prediction_per_sample_are_refused():
    student = nn.Linear(6, 4)
    config = DistillationConfig(nn.Linear(6, 4), TokenDistillationLossConfig())
    with pytest.raises(ConfigError, match=r"\(batch, sequence, vocabulary\), the student's have"):
        prepare_compression(student, [config], example_inputs=torch.randn(2, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "forward"}, "divergence got 'forward'; did you mean 'forward_kl'"),
        ({"temperature": 0}, "temperature must be a finite number above 0"),
        ({"loss_weights": 1}, "loss_weights must be a list of two entries"),
        ({"loss_weights": [1, -1]}, r"loss_weights\[1\] must be a finite number of at least 0"),
        ({"beta": 0}, "beta must be a finite number above 0"),
        ({"beta": 1}, "beta must be below 1, got 1"),
        ({"shift": 1}, "shift must be of type bool"),
        ({"ignore_index": "pad"}, "ignore_index must be an integer"),
        ({"vocabulary": "comon"}, "vocabulary got 'comon'; did you mean 'common'"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=f"TokenDistillationLossConfig.{message}"):
        TokenDistillationLossConfig(**options)
