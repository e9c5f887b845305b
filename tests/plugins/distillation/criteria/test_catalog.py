"""What a loss chosen by name is called with, whoever offers it."""

import functools

import pytest
import torch

from compression_manager import ConfigError
from compression_plugins.distillation.criteria.batch import Batch
from compression_plugins.distillation.criteria.catalog import NamedLoss, make_loss
from compression_plugins.distillation.losses import attention_transfer_loss

TARGET, MASK = torch.tensor([0, 1]), torch.tensor([1, 0])


def called(function, *, temperature=None, **arguments):
    """Return what `function` was called with besides the outputs."""
    seen = {}

    def keep(given):
        seen.update(given)
        return torch.zeros(())

    batch = Batch(None, None, None, **arguments)
    NamedLoss("own", function(keep))(torch.ones(2, 3), torch.ones(2, 3), batch, temperature)
    return seen


def test_a_loss_gets_what_its_signature_names():
    def every(keep):
        return lambda student, teacher, target, mask, num_items, temperature=1.0: keep(
            {"target": target, "mask": mask, "num_items": num_items, "temperature": temperature}
        )

    seen = called(every, temperature=2.0, target=TARGET, mask=MASK, num_items=7)
    assert seen["target"] is TARGET
    assert seen["mask"] is MASK
    assert (seen["num_items"], seen["temperature"]) == (7, 2.0)
    seen = called(every, target=TARGET, mask=MASK)
    assert (seen["num_items"], seen["temperature"]) == (None, 1.0)


def test_a_loss_gets_nothing_else():
    assert called(lambda keep: lambda student, teacher: keep({}), temperature=2.0) == {}


@pytest.mark.parametrize("name", ["target", "mask"])
def test_what_the_loop_left_out_is_named(name):
    functions = {
        "target": lambda student, teacher, target: student.sum(),
        "mask": lambda student, teacher, mask: student.sum(),
    }
    with pytest.raises(ConfigError, match=f"loss 'own' needs {name}; pass it: .*{name}="):
        called(lambda keep: functions[name])


def test_the_teacher_gets_no_gradient_from_any_loss():
    student, teacher = torch.randn(2, 4, 3, requires_grad=True).unbind()
    teacher = teacher.detach().requires_grad_()
    loss = NamedLoss("own", lambda student, teacher: (student - teacher).square().sum())
    value = loss(student, teacher, Batch(None, None, None), None)
    assert torch.autograd.grad(value, teacher, allow_unused=True) == (None,)


def test_only_the_built_in_loss_of_a_name_may_compare_other_shapes():
    assert NamedLoss("rkd_angle", make_loss("rkd_angle", {})).agreement == "samples"
    own = NamedLoss("attention_transfer", attention_transfer_loss)
    assert own.agreement == "everything"


def test_what_the_loop_passes_is_no_option():
    with pytest.raises(ConfigError, match="'DKD' has no option 'target'"):
        make_loss("DKD", {"target": TARGET})


def test_a_partial_of_a_third_party_under_a_built_in_name_agrees_in_everything():
    own = functools.partial(lambda student, teacher, scale: (student - teacher).sum(), scale=1)
    assert NamedLoss("rkd_distance", own).agreement == "everything"
    assert NamedLoss("rkd_distance", make_loss("rkd_distance", {})).agreement == "samples"
