"""Pairs of features: what is refused, and which projections a checkpoint leaves behind."""

import pytest
import torch

from compression_manager import CheckpointMismatchError, ConfigError
from compression_plugins.distillation.criteria.batch import Batch
from compression_plugins.distillation.criteria.catalog import NamedLoss, make_loss
from compression_plugins.distillation.criteria.features import FeatureComparison, FeaturePair
from compression_plugins.distillation.criteria.mappings import parse_mappings


def comparison(name="MSE/fc"):
    """Compare what the batch holds as both models' outputs."""
    mapping = parse_mappings("owner", "layer_mappings", ["fc"])[0]
    return FeatureComparison(
        [FeaturePair(mapping, NamedLoss("MSE", make_loss("MSE", {})), 1.0, name)],
        lambda batch, mapping: batch.student_output,
        lambda batch, mapping: batch.teacher_output,
        (),
    )


def checked(name="MSE/fc"):
    made = comparison(name)
    made.check(batch((4, 3), (4, 5)))
    return made


def batch(student, teacher):
    return Batch(None, torch.randn(student, requires_grad=True), torch.randn(teacher))


@pytest.mark.parametrize(("student", "teacher"), [((4, 3), (2, 3)), ((4,), (4,)), ((4, 3), (4,))])
def test_features_of_other_samples_are_refused(student, teacher):
    with pytest.raises(ConfigError, match="must begin with the same batch and have at least two"):
        comparison().check(batch(student, teacher))


def test_a_projection_of_a_pair_that_is_not_compared_is_refused():
    state = checked("MSE/conv").state_dict()
    with pytest.raises(CheckpointMismatchError, match=r"'MSE/conv', .* compared are MSE/fc"):
        comparison().load_state_dict(state)


def test_a_checkpoint_says_which_projections_there_are():
    first, second = checked(), checked()
    with torch.no_grad():
        for parameter in first.parameters().values():
            parameter.fill_(0.5)
    kept = dict(second.parameters())
    second.load_state_dict(first.state_dict())
    assert list(map(id, second.parameters().values())) == list(map(id, kept.values()))
    assert all((value == 0.5).all() for value in second.parameters().values())
    second.load_state_dict(comparison().state_dict())
    assert second.parameters() == {}
    fresh = comparison()
    fresh.load_state_dict(first.state_dict())
    assert all((value == 0.5).all() for value in fresh.parameters().values())
