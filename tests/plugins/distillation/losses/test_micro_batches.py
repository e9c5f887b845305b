"""The loss of a batch is the mean of its samples': splitting it changes nothing."""

import pytest
import torch

from compression_plugins.distillation import losses

TARGET = torch.tensor([0, 4, 2, 1, 1, 3])
LOGITS, MAPS = (6, 5), (6, 3, 2, 2)
PER_SAMPLE = {
    "kd": (LOGITS, lambda s, t, rows: losses.kd_loss(s, t, 2.0, label_smoothing=0.1)),
    "soft cross-entropy": (LOGITS, lambda s, t, rows: losses.soft_cross_entropy(s, t, 2.0)),
    "mse": (LOGITS, lambda s, t, rows: losses.mse_loss(s, t, 2.0)),
    "dkd": (LOGITS, lambda s, t, rows: losses.dkd_loss(s, t, TARGET[rows], 1.0, 4.0, 2.0)),
    "reverse": (LOGITS, lambda s, t, rows: losses.reverse_kl_loss(s, t, 2.0)),
    "js": (LOGITS, lambda s, t, rows: losses.jensen_shannon_loss(s, t, 0.3, 2.0)),
    "hint": (MAPS, lambda s, t, rows: losses.hint_loss(s, t)),
    "l1": (MAPS, lambda s, t, rows: losses.l1_loss(s, t)),
    "attention": (MAPS, lambda s, t, rows: losses.attention_transfer_loss(s, t)),
}
SPLITS = [[6], [1, 5], [2, 2, 2], [1] * 6]


def in_parts(loss, student, teacher, sizes):
    """Return loss and gradient of micro-batches that are weighted by their share of the samples."""
    leaf = student.clone().requires_grad_()
    total, first = torch.zeros((), dtype=student.dtype), 0
    for size in sizes:
        rows = slice(first, first + size)
        total = total + size / len(student) * loss(leaf[rows], teacher[rows], rows)
        first += size
    total.backward()
    return total.detach(), leaf.grad


@pytest.mark.parametrize("sizes", SPLITS[1:])
@pytest.mark.parametrize("name", PER_SAMPLE)
def test_micro_batches_average_to_the_whole(name, sizes):
    shape, loss = PER_SAMPLE[name]
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    whole = in_parts(loss, student, teacher, SPLITS[0])
    assert whole[1].count_nonzero() > 0
    for part, expected in zip(in_parts(loss, student, teacher, sizes), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)
