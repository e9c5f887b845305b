"""What loaders may give, and what the student, the teacher and the plugins get of it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import toys
from compression_manager import ConfigError
from compression_plugins import KnowledgeDistillationTrainer
from compression_plugins.trainer.batches import first_batch, unpack
from compression_plugins.trainer.evaluation import cross_entropy, measure
from probes import probe
from toy_teachers import CountingTeacher
from trainer_runs import KL


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, toys.CLASSES)

    def forward(self, first, second=None):
        return {"logits": self.fc(first + (0 if second is None else second))}


def _seen(data, model=None):
    """Train for one epoch; return the teacher, and what the loss hook was given."""
    seen = []
    spy = probe(
        on_after_compute_loss=lambda self, input, target, sample_ids: seen.append(
            (input, target, sample_ids)
        )
    )
    counting = CountingTeacher(toys.mlp())
    model = TwoInputs() if model is None else model
    KnowledgeDistillationTrainer(counting, KL, seed=0).train(
        model, data, data, 1, torch.optim.SGD(model.parameters(), 0.1),
        configs=[spy], progress=False,
    )  # fmt: skip
    return counting, seen


INPUTS, TARGETS = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])


def test_inputs_and_targets():
    counting, [(input, target, sample_ids)] = _seen([(INPUTS, TARGETS)])
    assert torch.equal(input, INPUTS)
    assert torch.equal(target, TARGETS)
    assert sample_ids is None
    assert torch.equal(counting.calls[-1][0][0], INPUTS)


def test_sample_ids_as_a_third_part():
    _, [(_, _, sample_ids)] = _seen([(INPUTS, TARGETS, ["a", "b", "c", "d"])])
    assert sample_ids == ["a", "b", "c", "d"]


@pytest.mark.parametrize("key", ["labels", "label"])
def test_a_mapping(key):
    batch = {"first": INPUTS, "second": INPUTS, key: TARGETS, "sample_ids": [1, 2, 3, 4]}
    counting, [(input, target, sample_ids)] = _seen([batch])
    assert set(input) == {"first", "second"}
    assert torch.equal(target, TARGETS)
    assert sample_ids == [1, 2, 3, 4]
    assert set(counting.calls[-1][1]) == {"first", "second"}
    assert set(batch) == {"first", "second", key, "sample_ids"}


def test_several_inputs_that_torch_collated_into_a_list():
    samples = [((INPUTS[i], INPUTS[i]), TARGETS[i]) for i in range(4)]
    counting, [(input, _, _)] = _seen(DataLoader(samples, batch_size=4))
    assert isinstance(input, tuple)
    assert len(counting.calls[-1][0]) == 2


def test_an_empty_loader_of_unknown_length_is_named():
    class Unsized:
        def __iter__(self):
            return iter(())

    model = TwoInputs()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = KnowledgeDistillationTrainer(toys.mlp(), KL)
    with pytest.raises(ConfigError, match="yielded no batch"):
        trainer.train(model, Unsized(), [(INPUTS, TARGETS)], 1, optimizer, progress=False)
    with pytest.raises(ConfigError, match="validation_loader is empty"):
        trainer.train(model, [(INPUTS, TARGETS)], Unsized(), 1, optimizer, progress=False)


def test_a_loader_is_not_begun_only_to_be_checked():
    class Counting(DataLoader):
        begun = 0

        def __iter__(self):
            self.begun += 1
            return super().__iter__()

    loader = Counting(toys.vectors(8), batch_size=4)
    _seen(loader)
    # The start, and one epoch of training and validation each; a batch for prepare.
    assert loader.begun == 4


def test_tensors_move_to_the_students_device():
    batch = unpack({"x": {"y": INPUTS}, "labels": TARGETS}, source="x", device=torch.device("meta"))
    assert batch.inputs["x"]["y"].device.type == "meta"
    assert batch.targets.device.type == "meta"


def _reference(logits, targets):
    """Cross-entropy and accuracy over all targets that count, float64."""
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    logits, targets = logits[targets != -100], targets[targets != -100]
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    loss = -log_probabilities[np.arange(len(targets)), targets].mean()
    return loss, (logits.argmax(1) == targets).mean()


@pytest.mark.parametrize("shape", [(7,), (7, 5)], ids=["classes", "tokens"])
def test_validation_weights_each_target_alike(shape):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, 3, generator=generator) * 4
    targets = torch.randint(3, shape, generator=generator)
    targets[1] = -100
    if len(shape) > 1:
        targets[4, 2:] = -100
    data = [(logits[:4], targets[:4]), (logits[4:5], targets[4:5]), (logits[5:], targets[5:])]
    metrics = measure(nn.Identity(), data, cross_entropy, None)
    loss, accuracy = _reference(logits.double().numpy(), targets.numpy())
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(accuracy, rel=1e-12)


def test_a_batch_in_which_no_target_counts_does_not_spoil_the_mean():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    ignored = torch.full((4,), -100)
    expected = measure(nn.Identity(), [(logits, targets)], cross_entropy, None)
    data = [(logits, targets), (logits, ignored)]
    assert measure(nn.Identity(), data, cross_entropy, None) == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_targets_of_few_bits_count_all(dtype):
    logits = torch.randn(3, 200)
    targets = torch.tensor([0, 156, 199])
    logits[1, 156] = 50.0
    expected = measure(nn.Identity(), [(logits, targets)], cross_entropy, None)
    data = [(logits, targets.to(dtype))]
    assert measure(nn.Identity(), data, cross_entropy, None) == expected


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(3, 2), torch.tensor([True, False, True])),
        (torch.zeros(2), torch.tensor(1)),
    ],
    ids=["bool", "no batch"],
)
def test_what_is_no_class_has_no_cross_entropy(logits, targets):
    with pytest.raises(ConfigError, match=r"pass criterion=function\(output, targets\)"):
        cross_entropy(logits, targets)


def test_a_look_at_the_first_batch_leaves_the_random_state():
    data = [(torch.full((2,), float(index)), index) for index in range(8)]
    before = torch.get_rng_state()
    first_batch(DataLoader(data, 4, shuffle=True), source="loader", device=None)
    assert torch.equal(torch.get_rng_state(), before)
