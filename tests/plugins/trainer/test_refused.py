"""What the trainer refuses, and that it does so before anything changes."""

import copy

import pytest
import torch
from torch import nn

import toys
from compression_manager import CheckpointError, ConfigError
from compression_plugins import (
    CheckpointConfig,
    EarlyStoppingConfig,
    KnowledgeDistillationTrainer,
)
from compression_plugins.trainer.checks import check_scheduler
from toy_teachers import condition
from trainer_runs import KL, Scripted, run, student, teacher, train_loader, validation_loader


def _train(trainer=None, model=None, **changes):
    """Train with changed arguments; whatever is refused leaves the student as it was."""
    trainer = trainer or KnowledgeDistillationTrainer(teacher(), KL)
    model = student() if model is None else model
    arguments = {
        "student": model,
        "train_loader": train_loader(),
        "validation_loader": validation_loader(),
        "epochs": 1,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "progress": False,
        **changes,
    }
    before = copy.deepcopy(model.state_dict()), condition(model)
    try:
        return trainer.train(**arguments)
    except Exception:
        assert condition(model) == before[1]
        toys.assert_identical(dict(model.state_dict()), dict(before[0]))
        raise


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"epochs": True}, "epochs"),
        ({"train_loader": []}, "train_loader is empty"),
        ({"validation_loader": []}, "validation_loader is empty"),
        ({"validation_loader": 3}, "validation_loader takes a data loader, got int"),
        ({"train_loader": iter(())}, "ends after one epoch"),
        ({"validation_loader": [torch.zeros(2, 1, 8, 8)]}, "a batch of validation_loader is a Ten"),
        ({"validation_loader": [(1, 2, 3, 4)]}, "is a tuple of 4; valid are"),
        ({"validation_loader": [{"x": 1, "lables": 2}]}, "did you mean 'lables'"),
        ({"optimizer": nn.Linear(1, 1)}, r"takes a torch.optim.Optimizer .* got Linear"),
        ({"configs": "QATConfig"}, "configs takes a list of plugin configs"),
        ({"configs": [CheckpointConfig("x")]}, "KnowledgeDistillationTrainer.checkpoint_config"),
        ({"configs": [EarlyStoppingConfig("f1")]}, "'f1', which the evaluation does not record"),
        ({"resume": True}, "resume=True. needs checkpoints"),
        ({"metrics": lambda model, loader: {"f1": 1.0}}, "'loss', which the evaluation does not"),
        ({"metrics": lambda model, loader: 0.9}, "returns a mapping of names to numbers"),
        ({"metrics": lambda model, loader: {"loss": "low"}}, "returned no numbers"),
        ({"scheduler_interval": "batch"}, "takes 'epoch' or 'step', got 'batch'"),
        ({"scheduler": 0.1}, "got float"),
    ],
)
def test_arguments(changes, message):
    with pytest.raises(ConfigError, match=message):
        _train(**changes)


def test_an_optimizer_of_another_model():
    with pytest.raises(ConfigError, match=r"'conv1.weight' and 7 others.*another model"):
        _train(optimizer=torch.optim.SGD(student().parameters(), 0.1))


def test_an_optimizer_that_lacks_a_parameter_names_it():
    model = student()
    others = [value for name, value in model.named_parameters() if name != "fc.bias"]
    optimizer = torch.optim.SGD(others, 0.1)
    with pytest.raises(ConfigError, match=r"'fc.bias': add them, or set requires_grad_"):
        _train(model=model, optimizer=optimizer)
    model.fc.bias.requires_grad_(False)
    _train(model=model, optimizer=optimizer)


def test_a_student_without_trainable_parameters():
    model = student().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing is trained"):
        _train(model=model)


def test_the_teacher_as_student():
    frozen = teacher()
    with pytest.raises(ConfigError, match="the teacher is the student itself"):
        _train(KnowledgeDistillationTrainer(frozen, KL), frozen)


def test_other_classes_than_the_teachers_before_the_first_step():
    model = toys.mlp(classes=3)
    data = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(ConfigError, match="differ in their classes"):
        _train(
            KnowledgeDistillationTrainer(toys.mlp(classes=4), KL),
            model,
            train_loader=data,
            validation_loader=data,
        )


def test_targets_that_are_no_classes():
    data = [(torch.randn(4, 1, 8, 8), torch.rand(4))]
    with pytest.raises(ConfigError, match=r"targets of shape \(4,\) and dtype torch.float32"):
        _train(train_loader=data, validation_loader=data)


def test_a_metric_that_the_default_does_not_record_names_the_ones_there_are():
    trainer = KnowledgeDistillationTrainer(teacher(), KL, metric="acuracy")
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        _train(trainer)


def test_a_metric_that_the_own_function_does_not_record(tmp_path):
    trainer = KnowledgeDistillationTrainer(
        teacher(), KL, CheckpointConfig(tmp_path / "folder", metric="score")
    )
    script = Scripted(1.0, name="scores")
    with pytest.raises(ConfigError, match="did you mean 'scores'"):
        _train(trainer, metrics=script)
    assert script.calls == 1
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(("metric", "lower"), [("loss", False), ("accuracy", True)])
def test_a_default_metric_in_the_wrong_direction(tmp_path, metric, lower):
    config = CheckpointConfig(tmp_path, metric=metric, lower_is_better=lower)
    with pytest.raises(ConfigError, match=f"set lower_is_better={not lower}"):
        _train(KnowledgeDistillationTrainer(teacher(), KL, config))


def test_checkpoints_of_another_training(tmp_path):
    run(KnowledgeDistillationTrainer(teacher(), KL, CheckpointConfig(tmp_path)), student(), 1)
    with pytest.raises(CheckpointError, match=r"step-00000004.*resume=True"):
        _train(KnowledgeDistillationTrainer(teacher(), KL, CheckpointConfig(tmp_path)))


def test_schedulers():
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedulers = torch.optim.lr_scheduler
    other = torch.optim.SGD(student().parameters(), 0.1)
    for scheduler, message in (
        (schedulers.StepLR(other, 1), "another optimizer"),
        (schedulers.OneCycleLR(optimizer, 0.1, total_steps=8), "scheduler_interval='step'"),
        (schedulers.ReduceLROnPlateau(optimizer, "max"), "mode='min'"),
    ):
        with pytest.raises(ConfigError, match=message):
            _train(model=model, optimizer=optimizer, scheduler=scheduler, epochs=2)
    whole = schedulers.OneCycleLR(optimizer, 0.1, total_steps=2)
    check_scheduler(whole, "epoch", optimizer, 2, lower_is_better=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, KL), "teacher must be of type Module"),
        ((nn.Linear(1, 1), None), "criterion"),
        ((nn.Linear(1, 1), "KL"), "criterion"),
        ((nn.Linear(1, 1), []), "strategy is empty"),
        ((nn.Linear(1, 1), KL, "runs"), "checkpoint_config must be of type CheckpointConfig"),
        ((nn.Linear(1, 1), KL, None, 1), "use_early_stopping must be of type bool"),
        ((nn.Linear(1, 1), KL, None, False, -1.0), "min_delta"),
        ((nn.Linear(1, 1), KL, None, False, 0.0, 0), "patience"),
        ((nn.Linear(1, 1), KL, None, False, 0.0, 1, -1), "seed must be an integer from 0"),
    ],
)
def test_constructor(arguments, message):
    with pytest.raises(ConfigError, match=message):
        KnowledgeDistillationTrainer(*arguments)


def test_two_deciding_metrics(tmp_path):
    config = CheckpointConfig(tmp_path, metric="accuracy")
    with pytest.raises(ConfigError, match="give it in one place"):
        KnowledgeDistillationTrainer(teacher(), KL, config, metric="f1")
    same = KnowledgeDistillationTrainer(teacher(), KL, config, metric="accuracy")
    assert (same.metric, same.lower_is_better) == ("accuracy", False)


def test_a_metric_that_vanishes_later_is_named():
    values = iter([{"score": 1.0}, {"other": 1.0}])
    trainer = KnowledgeDistillationTrainer(teacher(), KL, metric="score")
    with pytest.raises(ConfigError, match="'score', which the evaluation does not record"):
        run(trainer, student(), 2, metrics=lambda model, loader: next(values))
