"""The ready loop: what it trains, which weights it leaves behind, and what it says about it."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import toys
from compression_manager import prepare_compression
from compression_plugins import (
    BatchNormReestimationConfig,
    CheckpointConfig,
    DistillationConfig,
    KnowledgeDistillationLossConfig,
    KnowledgeDistillationTrainer,
    ProgressConfig,
    SelfKnowledgeDistillationLossConfig,
    TensorBoardConfig,
    TokenDistillationLossConfig,
)
from compression_plugins.checkpoint import best_checkpoint
from toy_teachers import CountingTeacher, condition
from trainer_runs import (
    KL,
    STEPS,
    Scripted,
    checkpoints,
    run,
    scores,
    student,
    teacher,
    train_loader,
    validation_loader,
)


def _trainer(**options):
    return KnowledgeDistillationTrainer(teacher(), KL, **{"seed": 5, **options})


def _same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_equals_the_loop_that_a_user_writes_with_the_hooks():
    model, expected = student(), student()
    script = Scripted(0, 1, 2)  # the last epoch is the best
    history = run(_trainer(metric="score"), model, 2, metrics=script)

    manager = prepare_compression(expected, [DistillationConfig(teacher(), KL)], seed=5)
    optimizer = torch.optim.AdamW(expected.parameters(), 0.01)
    loader = train_loader()
    losses = []
    for _ in manager.epochs(2):
        losses.append([])
        for _, (inputs, targets) in manager.steps(loader):
            output = expected(inputs)
            task = F.cross_entropy(output, targets)
            loss = manager.on_after_compute_loss(inputs, output, task)
            losses[-1].append((task.item(), loss.item()))
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            optimizer.zero_grad()
    assert _same(model, expected)
    for record, pairs in zip(history.epochs, losses, strict=True):
        task, total = np.asarray(pairs, dtype=np.float64).mean(0)
        assert record.losses["task"] == pytest.approx(task, rel=1e-6)
        assert record.losses["total"] == pytest.approx(total, rel=1e-6)
        divergence = record.losses["distillation/KL"]
        assert 0.5 * task + 0.5 * divergence == pytest.approx(total, rel=1e-6)


class _Augmented(Dataset):
    """Draws from all three generators for each sample."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return torch.full((1, 8, 8), index + noise), index % toys.CLASSES


def _seeded(seed, disturbance):
    random.seed(disturbance)
    np.random.seed(disturbance)
    model = student()
    torch.manual_seed(disturbance)
    batches = DataLoader(_Augmented(), 4, shuffle=True)
    return run(_trainer(seed=seed), model, 2, batches=batches), model


def test_equal_seeds_give_equal_bits_whatever_was_drawn_before():
    (first, model), (second, other) = _seeded(3, 0), _seeded(3, 1)
    assert first == second
    assert _same(model, other)


def test_another_seed_gives_another_training():
    assert _seeded(3, 0)[0] != _seeded(4, 0)[0]


def test_without_a_seed_the_random_state_of_the_caller_counts():
    assert _seeded(None, 0)[0] == _seeded(None, 0)[0]
    assert _seeded(None, 0)[0] != _seeded(None, 1)[0]


def test_evaluation_does_not_shift_the_random_numbers_of_training():
    def drawing(model, loader):
        torch.rand(3), random.random(), np.random.rand()
        return {"score": 1.0}

    calm, drawn = student(), student()
    run(_trainer(metric="score"), calm, metrics=lambda model, loader: {"score": 1.0})
    run(_trainer(metric="score"), drawn, metrics=drawing)
    assert _same(calm, drawn)


@pytest.mark.parametrize(
    ("values", "lower_is_better", "best"),
    [
        ([0.9, 0.2, 0.5, 0.4], False, 1),
        ([0.1, 0.5, 0.2, 0.4], True, 1),
        ([0.9, 0.3, 0.3, 0.3], False, 0),  # of equals the first; the start is no candidate
        ([0.0, math.nan, 0.1, math.nan], False, 1),
    ],
)
def test_the_best_epochs_weights_are_restored(values, lower_is_better, best):
    model, script = student(), Scripted(*values)
    trainer = _trainer(metric="score", lower_is_better=lower_is_better)
    history = run(trainer, model, metrics=script)
    assert history.best_epoch == best
    assert history.best == history.epochs[best]
    assert history.initial_metrics == {"score": values[0]}
    np.testing.assert_array_equal(scores(history), values[1:])
    expected = script.weights[1 + best]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    last = script.weights[-1]
    assert best == 2 or not torch.equal(model.fc.weight, last["fc.weight"])


def test_with_nan_in_every_epoch_the_last_weights_stay():
    model, script = student(), Scripted(0, math.nan, math.nan)
    history = run(_trainer(metric="score"), model, 2, metrics=script)
    assert (history.best_epoch, history.best) == (None, None)
    assert torch.equal(model.fc.weight, script.weights[-1]["fc.weight"])


def test_default_metrics_are_those_of_the_restored_student():
    model = student()
    history = run(_trainer(), model)
    data = validation_loader().dataset
    inputs, targets = data.tensors
    with torch.no_grad():
        logits = model(inputs).double()
    log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
    loss = -log_probabilities[torch.arange(20), targets].mean()
    assert history.metric == "loss"
    assert history.lower_is_better
    assert history.best.metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    accuracy = (logits.argmax(1) == targets).double().mean().item()
    assert history.best.metrics["accuracy"] == accuracy
    assert history.best.metrics["loss"] == min(scores(history, "loss"))


@pytest.mark.parametrize(
    ("options", "values", "trained", "stopped"),
    [
        ({"early_stopping_min_delta": 0.1}, [9, 1.0, 0.9, 0.95], 3, True),  # exactly 0.1: none
        ({"early_stopping_min_delta": 0.1}, [9, 1.0, 0.89, 0.78, 0.67], 4, False),
        ({}, [9, 1.0, 0.9995, 0.999], 3, True),  # 0.001 is the default, and not exceeded
        ({}, [9, 1.0, 1.2, 0.9, 1.1], 4, False),  # patience counts epochs in a row
        ({"lower_is_better": False}, [0, 0.5, 0.4, 0.3], 3, True),
        ({"lower_is_better": False}, [0, 0.5, 0.6, 0.7, 0.8], 4, False),
    ],
)
def test_early_stopping(options, values, trained, stopped):
    base = {"metric": "score", "lower_is_better": True, "early_stopping_patience": 2}
    trainer = _trainer(use_early_stopping=True, **{**base, **options})
    history = run(trainer, student(), 4, metrics=Scripted(*values))
    assert len(history.epochs) == trained
    assert (history.stop_reason is not None) == stopped
    if stopped:
        assert "score did not improve" in history.stop_reason


def test_without_early_stopping_all_epochs_are_trained():
    trainer = _trainer(metric="score", early_stopping_patience=1)
    history = run(trainer, student(), 3, metrics=Scripted(0, 3, 2, 1))
    assert len(history.epochs) == 3
    assert history.stop_reason is None


def test_early_stopping_begins_anew_with_each_training():
    trainer = _trainer(metric="score", use_early_stopping=True, early_stopping_patience=2)
    assert len(run(trainer, student(), 4, metrics=Scripted(0, 9, 8, 8, 8)).epochs) == 3
    # Against the 9 of the first training, none of these would be an improvement.
    history = run(trainer, student(), 4, metrics=Scripted(0, 1, 2, 3, 4))
    assert len(history.epochs) == 4
    assert history.best_epoch == 3


def test_keeps_the_best_checkpoints_and_not_the_oldest(tmp_path):
    config = checkpoints(tmp_path, metric="score", keep_best_n=2)
    history = run(
        _trainer(checkpoint_config=config),
        student(),
        5,
        metrics=Scripted(0, 0.1, 0.5, 0.2, 0.7, 0.3),
    )
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == [f"step-{STEPS * (epoch + 1):08d}" for epoch in (1, 3, 4)]
    assert best_checkpoint(tmp_path / "checkpoints").name == f"step-{STEPS * 4:08d}"
    assert history.best_epoch == 3


def test_a_checkpoint_config_without_a_metric_keeps_the_lowest_validation_loss(tmp_path):
    history = run(_trainer(checkpoint_config=checkpoints(tmp_path)), student(), 4, rate=0.3)
    losses = scores(history, "loss")
    assert history.best_epoch == losses.index(min(losses)) < 3
    best = best_checkpoint(tmp_path / "checkpoints")
    assert best.name == f"step-{STEPS * (history.best_epoch + 1):08d}"


def test_saves_every_nth_epoch_and_still_restores_the_best(tmp_path):
    config = checkpoints(tmp_path, metric="score", save_every_epochs=2, keep_last=9)
    model, script = student(), Scripted(0, 9, 1, 2, 3, 4)
    run(_trainer(checkpoint_config=config), model, 5, metrics=script)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == [f"step-{STEPS * epochs:08d}" for epochs in (2, 4)]
    assert torch.equal(model.fc.weight, script.weights[1]["fc.weight"])


def test_nothing_is_left_on_student_and_teacher(tmp_path):
    frozen = teacher()
    model = student()
    weights = copy.deepcopy(frozen.state_dict())
    before = condition(frozen)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    classes = [type(module) for module in model.modules()]
    trainer = KnowledgeDistillationTrainer(frozen, KL)
    run(trainer, model, configs=[TensorBoardConfig(tmp_path)])
    assert condition(frozen) == before
    assert all(torch.equal(value, weights[name]) for name, value in frozen.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert after == hooks
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_teacher_runs_once_per_step_in_eval_mode_for_several_strategies():
    counting = CountingTeacher(teacher())
    modes = []
    counting.register_forward_hook(lambda module, args, output: modes.append(module.training))
    mse = KnowledgeDistillationLossConfig(1.0, ("CE", "MSE"), (0.5, 0.25))
    trainer = KnowledgeDistillationTrainer(counting, [KL, mse], seed=0)
    history = run(trainer, student(), 2)
    assert len(counting.calls) in (2 * STEPS, 2 * STEPS + 1, 2 * STEPS + 2)  # and at prepare
    assert not any(modes)
    losses = history.epochs[0].losses
    names = [name for name in losses if name.startswith("distillation")]
    assert [name.split("/")[1] for name in names] == ["KL", "MSE"]
    total = 0.5 * losses["task"] + 0.5 * losses[names[0]] + 0.25 * losses[names[1]]
    assert losses["total"] == pytest.approx(total, rel=1e-12)


def test_self_distillation_is_a_strategy_alone_and_beside_others():
    itself = SelfKnowledgeDistillationLossConfig([[["conv1", "conv2"]]], "attention_transfer")
    for strategy, forwards in ((itself, False), ([KL, itself], True)):
        counting = CountingTeacher(teacher())
        history = run(KnowledgeDistillationTrainer(counting, strategy, seed=0), student(), 1)
        assert bool(counting.calls) == forwards
        terms = [name for name in history.epochs[0].losses if "attention_transfer" in name]
        assert len(terms) == 1


def test_token_distillation_takes_the_labels_of_the_batches_as_targets():
    torch.manual_seed(0)
    tokens = torch.randint(9, (4, 5))
    labels = tokens.masked_fill(torch.rand(4, 5) < 0.5, -100)
    model, frozen = (
        CountingTeacher(nn.Sequential(nn.Embedding(9, width), nn.Linear(width, 9)))
        for width in (4, 8)
    )
    batches = [{"input": tokens, "labels": labels}]
    with torch.no_grad():
        own, other = (item.inner(tokens).log_softmax(-1) for item in (model, frozen))
    expected = (other.exp() * (other - own)).sum(-1)[labels != -100].mean().item()
    history = KnowledgeDistillationTrainer(frozen, TokenDistillationLossConfig()).train(
        model, batches, batches, 1, torch.optim.SGD(model.parameters(), 0.1), progress=False
    )
    (name,) = set(history.epochs[0].losses) - {"task", "total"}
    assert history.epochs[0].losses[name] == pytest.approx(expected, rel=1e-5)


def test_own_criterion_is_what_is_trained_and_measured():
    data = [(torch.randn(4, 6), torch.randn(4, 3)) for _ in range(3)]
    torch.manual_seed(0)
    model = toys.mlp(classes=3)
    mse = KnowledgeDistillationLossConfig(1.0, ("MSE", "MSE"))
    history = KnowledgeDistillationTrainer(toys.mlp(classes=3), mse).train(
        model, data, data[:1], 2, torch.optim.SGD(model.parameters(), 0.1),
        criterion=F.mse_loss, progress=False,
    )  # fmt: skip
    measured = F.mse_loss(model(data[0][0]), data[0][1]).item()
    assert history.best.metrics == {"loss": pytest.approx(measured, rel=1e-6)}


def test_parts_that_were_in_eval_mode_on_purpose_stay_so():
    model = student()
    model.bn1.eval()
    before = model.bn1.running_mean.clone()
    other = model.bn2.running_mean.clone()
    run(_trainer(), model)
    assert torch.equal(model.bn1.running_mean, before)
    assert not torch.equal(model.bn2.running_mean, other)


def test_a_student_in_eval_mode_is_trained_in_train_mode():
    model, expected = student().eval(), student()
    run(_trainer(), model)
    run(_trainer(), expected)
    assert _same(model, expected)


def test_gradients_from_before_do_not_count():
    model, expected = student(), student()
    model(torch.ones(2, 1, 8, 8)).sum().backward()
    expected.load_state_dict(model.state_dict())  # BatchNorm saw a batch
    run(_trainer(), model)
    run(_trainer(), expected)
    assert _same(model, expected)


@pytest.mark.parametrize(("interval", "expected"), [("epoch", 0.01 / 4), ("step", 0.01 / 2**8)])
def test_moves_the_scheduler(interval, expected):
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    _trainer().train(
        model, train_loader(), validation_loader(), 2, optimizer,
        scheduler=scheduler, scheduler_interval=interval, progress=False,
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_a_plateau_scheduler_follows_the_deciding_metric():
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, patience=0)
    script = Scripted(0, 1, 0.5, 2)
    _trainer(metric="score").train(
        model, train_loader(), validation_loader(), 3, optimizer,
        metrics=lambda *given: {"before": script.calls, **script(*given), "after": script.calls},
        scheduler=scheduler, progress=False,
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 0.005


def test_shows_progress_unless_told_otherwise(capfd):
    run(_trainer(), student(), 1, progress=True)
    assert "epoch 0: loss/task" in capfd.readouterr().err
    run(_trainer(), student(), 1)
    assert capfd.readouterr().err == ""


def test_an_own_progress_config_takes_the_place_of_the_bar(capfd):
    run(_trainer(), student(), 1, configs=[ProgressConfig()], progress=True)
    assert capfd.readouterr().err.count("epoch 0: loss/task") == 1


def test_writes_losses_and_metrics_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = run(_trainer(), student(), 2, configs=[TensorBoardConfig(tmp_path)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [item.step for item in events.Scalars("eval/loss")] == [STEPS, 2 * STEPS]
    assert [item.value for item in events.Scalars("eval/loss")] == pytest.approx(
        scores(history, "loss")
    )
    assert len(events.Scalars("loss/distillation/KL")) == 2 * STEPS


def test_teacher_predictions_leave_no_trace():
    inner = toys.ConvNet(8, dropout=0.5)
    inner.train()
    wrapped = CountingTeacher(inner, wrap=lambda logits: {"logits": logits})
    trainer = KnowledgeDistillationTrainer(wrapped, KL)
    inputs = torch.randn(3, 1, 8, 8, requires_grad=True)
    before, state = condition(wrapped), torch.get_rng_state()
    logits = trainer.get_teacher_predictions(inputs)
    assert condition(wrapped) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not logits.requires_grad
    expected = copy.deepcopy(inner).eval()(inputs)
    assert torch.equal(logits, expected)


def test_teacher_predictions_take_what_the_loop_gives_the_student():
    trainer = KnowledgeDistillationTrainer(CountingTeacher(toys.mlp()), KL)
    inputs = torch.randn(2, 6)
    expected = trainer.get_teacher_predictions(inputs)
    assert torch.equal(trainer.get_teacher_predictions((inputs,)), expected)
    batch = {"x": inputs, "labels": torch.zeros(2)}
    assert torch.equal(trainer.get_teacher_predictions(batch), expected)


def test_a_checkpoint_config_is_not_changed(tmp_path):
    config = CheckpointConfig(tmp_path)
    KnowledgeDistillationTrainer(nn.Linear(1, 1), KL, config)
    assert config.metric is None


def test_a_checkpoint_config_that_is_switched_off_saves_nothing(tmp_path):
    run(_trainer(checkpoint_config=checkpoints(tmp_path, enabled=False)), student(), 1)
    assert list(tmp_path.iterdir()) == []


def test_what_plugins_do_in_the_end_is_done_to_the_best_weights():
    """Such as new statistics of BatchNorm, which are those of other weights otherwise."""

    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.net = nn.BatchNorm2d(1, momentum=0.9), student()

        def forward(self, images):
            return self.net(self.norm(images))

    torch.manual_seed(3)
    model = Normalized()
    loader = train_loader()
    trainer = _trainer(metric="score")
    run(
        trainer,
        model,
        metrics=Scripted(0.0, 0.9, 0.1, 0.2),
        configs=[BatchNormReestimationConfig(dataloader=loader)],
    )
    means = [batch.mean((0, 2, 3)) for batch, *_ in loader]
    torch.testing.assert_close(model.norm.running_mean, torch.stack(means).mean(0))
