"""What bridges features of different shape."""

import numpy as np
import pytest
import torch
from torch import nn

from compression_manager import CheckpointMismatchError, ConfigError
from compression_plugins.distillation.criteria.projections import (
    identity_projection,
    make_projection,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        ((4, 3), (4, 5), nn.Linear),
        ((4, 7, 3), (4, 7, 5), nn.Linear),
        ((4, 3, 7), (4, 5, 7), nn.Conv1d),
        ((4, 3, 8, 8), (4, 5, 8, 8), nn.Conv2d),
        ((4, 3, 8, 8), (4, 5, 4, 4), nn.Conv2d),
        ((4, 3, 4, 4), (4, 5, 8, 6), nn.Conv2d),
        ((4, 3, 4, 4, 2), (4, 5, 8, 8, 2), nn.Conv3d),
        ((4, 3, 4, 4, 2), (4, 3, 8, 8, 4), None),
        ((4, 5, 8, 8), (4, 5, 4, 4), None),
    ],
)
def test_it_leads_from_one_shape_to_the_other(student, teacher, kind):
    projection = make_projection(student, teacher, width_too=True, device=CPU)
    assert projection(torch.randn(student)).shape == teacher
    assert type(projection.map) is (kind or type(None))


def test_nothing_is_made_where_nothing_must_be():
    assert make_projection((4, 3), (4, 3), width_too=True, device=CPU) is None
    assert make_projection((4, 3, 8, 8), (4, 5, 8, 8), width_too=False, device=CPU) is None


def test_without_the_width_only_the_size_changes():
    projection = make_projection((4, 3, 8, 8), (4, 5, 4, 4), width_too=False, device=CPU)
    feature = torch.randn(4, 3, 12, 12)  # Of factors of 2, linear interpolation is the mean too.
    blocks = feature.double().numpy().reshape(4, 3, 4, 3, 4, 3).mean((3, 5))
    np.testing.assert_allclose(projection(feature).numpy(), blocks, atol=1e-6)
    assert list(projection.parameters()) == []


def test_shrinking_one_side_alone_averages_too():
    projection = make_projection((4, 3, 8, 5), (4, 3, 2, 5), width_too=True, device=CPU)
    feature = torch.randn(4, 3, 8, 5)
    blocks = feature.double().numpy().reshape(4, 3, 2, 4, 5).mean(3)
    np.testing.assert_allclose(projection(feature).numpy(), blocks, atol=1e-6)


def interpolated(values, size, axis):
    """Linear between the centers of the pixels, and constant beyond the outer ones."""
    length = values.shape[axis]
    centers = (np.arange(size) + 0.5) * length / size - 0.5
    return np.apply_along_axis(
        lambda line: np.interp(centers, np.arange(length), line), axis, values
    )


@pytest.mark.parametrize(
    ("before", "after"), [((4, 4), (8, 6)), ((3, 5), (7, 2)), ((4, 3, 2), (8, 3, 5))]
)
def test_growing_is_linear_between_the_centers_of_the_pixels(before, after):
    projection = make_projection((2, 3, *before), (2, 3, *after), width_too=True, device=CPU)
    feature = torch.randn(2, 3, *before)
    expected = feature.double().numpy()
    for axis, size in enumerate(after, 2):
        expected = interpolated(expected, size, axis)
    np.testing.assert_allclose(projection(feature).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((4, 3), (5, 3)),
        ((4, 3), (4, 3, 2)),
        ((4, 7, 3), (4, 6, 5)),
        ((4,), (5,)),
        ((2, 1, 1, 1, 1, 1), (2, 2, 1, 1, 1, 1)),
    ],
)
def test_other_shapes_are_refused(student, teacher):
    with pytest.raises(ConfigError, match="no projection leads from one to the other"):
        make_projection(student, teacher, width_too=True, device=CPU)


def test_drawing_the_weights_leaves_the_random_state():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make_projection((4, 3), (4, 5), width_too=True, device=CPU)
    assert torch.equal(torch.rand(2), expected)


def test_half_precision_features_are_projected_in_float32():
    projection = make_projection((4, 3), (4, 5), width_too=True, device=CPU)
    feature = torch.randn(4, 3, dtype=torch.bfloat16)
    assert torch.equal(projection(feature), projection(feature.float()))


def test_a_description_restores_weights_and_gradients_of_any_shape():
    original = make_projection((4, 3, 8, 8), (4, 5, 4, 4), width_too=True, device=CPU)
    feature = torch.randn(4, 3, 8, 8)
    original(feature).sum().backward()
    described = original.describe()
    restored = identity_projection().restore(described, "conv1")
    assert torch.equal(restored(feature), original(feature))
    assert torch.equal(restored.map.weight.grad, original.map.weight.grad)
    same = make_projection((4, 3, 8, 8), (4, 5, 4, 4), width_too=True, device=CPU)
    parameters = list(same.parameters())
    assert same.restore(described, "conv1") is same
    assert list(map(id, same.parameters())) == list(map(id, parameters))
    assert torch.equal(same(feature), original(feature))
    described["gradients"] = {}
    assert same.restore(described, "conv1").map.weight.grad is None


@pytest.mark.parametrize(
    "described", [{}, {"made_with": (None, (3, 4), None), "parameters": {}, "gradients": {}}]
)
def test_what_is_no_description_is_refused(described):
    with pytest.raises(CheckpointMismatchError, match="projection of 'conv1' does not fit"):
        identity_projection().restore(described, "conv1")
