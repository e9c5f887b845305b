"""Where the labels of a loss call are found."""

import pytest
import torch

from compression_plugins.distillation.criteria.batch import Batch

OWN, LABEL, LABELS = (torch.full((2,), value) for value in range(3))


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_arguments_with_labels_the_first_by_name_is_taken(order):
    given = dict([("label", LABEL), ("labels", LABELS)][::order])
    assert Batch(given, None, None).labels() is LABEL
    assert Batch({**given, "label": None}, None, None).labels() is LABELS


def test_what_the_loop_passes_goes_before_the_arguments():
    assert Batch({"label": LABEL}, None, None, target=OWN).labels() is OWN
    assert Batch(LABEL, None, None).labels() is None
