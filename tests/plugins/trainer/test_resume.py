"""An interrupted training, continued anew, ends with the bits of an uninterrupted one."""

import pytest
import torch
from torch.utils.data import DataLoader

import toys
from compression_manager import CheckpointMismatchError
from compression_plugins import (
    CheckpointConfig,
    KnowledgeDistillationTrainer,
    QATConfig,
)
from trainer_runs import (
    KL,
    STEPS,
    Failing,
    Interrupted,
    Scripted,
    run,
    scores,
    student,
    teacher,
    train_loader,
    validation_loader,
)

EPOCHS = 4


def _process(folder, *, fails_at=None, quantize=False, every_step=False, stop=False, epochs=EPOCHS):
    """What a script does that may be run again after it was interrupted."""
    saved = {"save_every_steps": 1} if every_step else {}
    trainer = KnowledgeDistillationTrainer(
        teacher(),
        KL,
        CheckpointConfig(folder, metric="loss", lower_is_better=True, **saved),
        use_early_stopping=stop,
        early_stopping_patience=1,
        early_stopping_min_delta=0.5,
        seed=7,
    )
    model = student()
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    batches = train_loader() if fails_at is None else Failing(train_loader(), fails_at)
    history = trainer.train(
        model, batches, validation_loader(), epochs, optimizer,
        scheduler=scheduler, configs=[QATConfig()] if quantize else [], resume=True, progress=False,
    )  # fmt: skip
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.close()
    return history, state, optimizer.state_dict()


@pytest.mark.parametrize(
    ("quantize", "every_step", "fails_at"),
    [
        (False, False, 0),
        (False, False, STEPS + 2),
        (False, True, 3 * STEPS),
        (False, True, 2 * STEPS + 1),
        (True, False, STEPS + 2),
        (True, True, STEPS + 2),
    ],
)
def test_resumed_after_an_exception_in_mid_epoch(tmp_path, quantize, every_step, fails_at):
    options = {"quantize": quantize, "every_step": every_step}
    expected = _process(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        _process(tmp_path / "cut", fails_at=fails_at, **options)
    toys.assert_identical(_process(tmp_path / "cut", **options), expected)


def test_interrupted_twice(tmp_path):
    expected = _process(tmp_path / "whole", every_step=True)
    for fails_at in (2, 6):
        with pytest.raises(Interrupted):
            _process(tmp_path / "cut", fails_at=fails_at, every_step=True)
    toys.assert_identical(_process(tmp_path / "cut", every_step=True), expected)


def test_more_epochs_continue_a_finished_training(tmp_path):
    expected = _process(tmp_path / "whole")
    _process(tmp_path / "cut", epochs=2)
    toys.assert_identical(_process(tmp_path / "cut"), expected)


def test_a_finished_training_gives_its_history_and_best_weights_again(tmp_path):
    history, weights, _ = _process(tmp_path)
    again = _process(tmp_path, fails_at=0)
    assert again[0] == history
    toys.assert_identical(again[1], weights)


def test_a_training_that_stopped_early_stays_stopped(tmp_path):
    history, weights, _ = _process(tmp_path, stop=True)
    assert len(history.epochs) == 2
    again = _process(tmp_path, fails_at=0, stop=True)
    assert again[0] == history
    assert again[0].stop_reason is not None
    toys.assert_identical(again[1], weights)


def test_a_shuffled_validation_loader_with_its_own_generator(tmp_path):
    def process(folder, fails_at=None):
        batches = train_loader() if fails_at is None else Failing(train_loader(), fails_at)
        generator = torch.Generator().manual_seed(3)
        orders = []

        def order(model, loader):
            orders.append([value.item() for _, targets in loader for value in targets])
            return {"loss": 1.0}

        trainer = KnowledgeDistillationTrainer(teacher(), KL, CheckpointConfig(folder), seed=0)
        model = student()
        data = toys.images(20, seed=1)
        trainer.train(
            model, batches, DataLoader(data, 4, shuffle=True, generator=generator), 3,
            torch.optim.SGD(model.parameters(), 0.1), metrics=order, resume=True, progress=False,
        )  # fmt: skip
        return orders, generator.get_state()

    orders, state = process(tmp_path / "whole")
    assert len(orders) == 4
    assert orders[0] != [target.item() for _, target in toys.images(20, seed=1)]
    assert all(item == orders[0] for item in orders)
    assert torch.equal(state, torch.Generator().manual_seed(3).get_state())
    with pytest.raises(Interrupted):
        process(tmp_path / "cut", STEPS + 1)
    assert process(tmp_path / "cut")[0][-1] == orders[-1]


def _scripted(folder, script, batches=None):
    trainer = KnowledgeDistillationTrainer(
        teacher(),
        KL,
        CheckpointConfig(folder, metric="score"),
        use_early_stopping=True,
        early_stopping_patience=2,
        seed=0,
    )
    return run(trainer, student(), 6, batches=batches, metrics=script, resume=True)


def test_early_stopping_counts_on_after_resuming(tmp_path):
    with pytest.raises(Interrupted):
        _scripted(tmp_path, Scripted(0, 9, 5), Failing(train_loader(), 2 * STEPS + 1))
    # One epoch without improvement was counted before the interruption, a second one stops.
    history = _scripted(tmp_path, Scripted(0, 6))
    assert scores(history) == [9, 5, 6]
    assert history.stop_reason is not None
    assert history.best_epoch == 0


def test_an_epoch_of_before_the_interruption_can_be_the_best(tmp_path):
    first, second = Scripted(0, 1, 9), Scripted(0, 2, 3)
    with pytest.raises(Interrupted):
        _scripted(tmp_path, first, Failing(train_loader(), 2 * STEPS + 1))
    trainer = KnowledgeDistillationTrainer(
        teacher(), KL, CheckpointConfig(tmp_path, metric="score"), seed=0
    )
    model = student()
    # That early stopping is not listed any more is refused; its count would be lost.
    with pytest.raises(CheckpointMismatchError, match="early_stopping"):
        run(trainer, model, 4, metrics=second, resume=True)
    history = _scripted(tmp_path, Scripted(0, 2, 3))
    assert history.best_epoch == 1
    assert scores(history) == [1, 9, 2, 3]


def test_the_first_run_of_a_script_that_resumes_begins_at_the_start(tmp_path):
    trainer = KnowledgeDistillationTrainer(teacher(), KL, CheckpointConfig(tmp_path / "new"))
    assert len(run(trainer, student(), 2, resume=True).epochs) == 2


def test_another_deciding_metric_is_refused(tmp_path):
    run(KnowledgeDistillationTrainer(teacher(), KL, CheckpointConfig(tmp_path)), student(), 1)
    other = KnowledgeDistillationTrainer(
        teacher(), KL, CheckpointConfig(tmp_path, metric="accuracy")
    )
    with pytest.raises(CheckpointMismatchError, match=r"'accuracy'.*'loss'"):
        run(other, student(), 2, resume=True)


def test_another_direction_of_the_deciding_metric_is_refused(tmp_path):
    def trainer(lower):
        config = CheckpointConfig(tmp_path, metric="score", lower_is_better=lower)
        return KnowledgeDistillationTrainer(teacher(), KL, config)

    run(trainer(True), student(), 1, metrics=Scripted(0, 1))
    with pytest.raises(CheckpointMismatchError, match=r"=False\).*'score' \(lower_is_better=True"):
        run(trainer(False), student(), 2, metrics=Scripted(0, 1, 2), resume=True)


def test_another_teacher_is_refused(tmp_path):
    run(KnowledgeDistillationTrainer(teacher(), KL, CheckpointConfig(tmp_path)), student(), 1)
    other = KnowledgeDistillationTrainer(toys.ConvNet(8), KL, CheckpointConfig(tmp_path))
    with pytest.raises(CheckpointMismatchError, match="another teacher"):
        run(other, student(), 2, resume=True)
