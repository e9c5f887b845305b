"""Distillation and quantization in one training."""

import pytest
import torch

import toys
from compression_manager import LifecycleError, StartAt, deploy
from compression_plugins import (
    KnowledgeDistillationTrainer,
    LearnedScaleConfig,
    QATConfig,
    QuantizationAwareTrainingConfig,
)
from trainer_runs import KL, Failing, Interrupted, Scripted, run, student, teacher, train_loader


def _trainer(**options):
    return KnowledgeDistillationTrainer(teacher(), KL, seed=0, **options)


def test_converts_what_was_trained_and_closes_to_the_float_model(tmp_path):
    model = student()
    classes = [type(module) for module in model.modules()]
    trainer = _trainer()
    run(trainer, model, configs=[QuantizationAwareTrainingConfig()])
    inputs = toys.images(6, seed=9).tensors[0]
    int8 = trainer.manager.convert(inputs)
    with torch.no_grad():
        torch.testing.assert_close(int8(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    trainer.manager.save_converted(tmp_path / "int8")
    served = deploy.load(tmp_path / "int8", student(seed=0))
    assert torch.equal(served(inputs), int8(inputs))
    trainer.close()
    assert [type(module) for module in model.modules()] == classes
    assert not any(module.training for module in model.modules())
    with pytest.raises(LifecycleError, match="no open manager"):
        _ = trainer.manager


def test_restores_the_best_quantized_weights():
    model, script = student(), Scripted(0, 1, 9, 2)
    trainer = _trainer(metric="score")
    run(trainer, model, metrics=script, configs=[QATConfig(), LearnedScaleConfig()])
    toys.assert_identical(dict(model.state_dict()), dict(script.weights[2]))
    trainer.close()


def test_an_epoch_before_quantization_began_is_no_candidate():
    model, script = student(), Scripted(0, 9, 8, 1, 2)
    late = QATConfig(fake_quantize_at=StartAt(epoch=2))
    trainer = _trainer(metric="score")
    history = run(trainer, model, 4, metrics=script, configs=[late])
    assert history.best_epoch == 3
    trainer.manager.convert()
    trainer.close()


def test_without_quantization_there_is_no_manager_to_ask():
    trainer = _trainer()
    run(trainer, student(), 1)
    with pytest.raises(LifecycleError, match="QATConfig"):
        _ = trainer.manager


def test_the_next_training_closes_the_one_before():
    trainer, first = _trainer(), student()
    run(trainer, first, 1, configs=[QATConfig()])
    manager = trainer.manager
    run(trainer, student(), 1)
    assert type(first.conv1) is torch.nn.Conv2d
    with pytest.raises(LifecycleError, match="closed"):
        manager.convert()


def test_a_with_block_closes():
    model = student()
    with _trainer() as trainer:
        run(trainer, model, 1, configs=[QATConfig()])
        assert type(model.conv1) is not torch.nn.Conv2d
    assert type(model.conv1) is torch.nn.Conv2d


def test_an_exception_in_training_gives_the_float_model_back():
    model, frozen = student(), teacher()
    trainer = KnowledgeDistillationTrainer(frozen, KL)
    with pytest.raises(Interrupted):
        run(trainer, model, batches=Failing(train_loader(), 2), configs=[QATConfig()])
    assert type(model.conv1) is torch.nn.Conv2d
    assert all(parameter.requires_grad for parameter in frozen.parameters())
    with pytest.raises(LifecycleError, match="no open manager"):
        _ = trainer.manager
