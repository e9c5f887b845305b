"""The error that a cache reports, against NumPy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toys
from cached_teachers import built, counting_teacher, live
from compression_manager import ConfigError
from compression_plugins.distillation.cache import CacheDistortion

IDS = torch.arange(3, 40)


def _kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    def log_softmax(values: np.ndarray) -> np.ndarray:
        scaled = values / temperature
        scaled = scaled - scaled.max(-1, keepdims=True)
        return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))

    own, other = log_softmax(teacher), log_softmax(student)
    return (np.exp(own) * (own - other)).sum(-1) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"top_k": 2}, {"top_k": 1, "dtype": "float16"}]
)
def test_it_is_the_difference_of_the_losses(
    tmp_path: Path, options: dict[str, Any], temperature: float
) -> None:
    teacher = counting_teacher()
    cache = built(tmp_path / "cache", teacher, **options)
    student, exact = torch.randn(len(IDS), toys.CLASSES), live(teacher, IDS)
    found = cache.distortion(student, exact, IDS, temperature=temperature)
    own, right, stored = (item.double().numpy() for item in (student, exact, cache.lookup(IDS)))
    loss = _kl(right, own, temperature)
    error = np.abs(_kl(stored, own, temperature) - loss).mean()
    assert error > 0
    assert found.loss_absolute_error == pytest.approx(error, rel=1e-9)
    assert found.loss_relative_error == pytest.approx(error / loss.mean(), rel=1e-9)
    assert found.kl == pytest.approx(_kl(right, stored, 1.0).mean(), rel=1e-9)
    assert found.top1_agreement == (right.argmax(-1) == stored.argmax(-1)).mean()
    assert found.temperature == temperature
    assert isinstance(found, CacheDistortion)


def test_it_is_zero_for_exact_outputs(tmp_path: Path) -> None:
    cache = built(tmp_path / "cache", counting_teacher())
    exact = cache.lookup(IDS)
    for student in (torch.randn(len(IDS), toys.CLASSES), exact):
        found = cache.distortion(student, exact, IDS, temperature=2.0)
        assert (found.loss_absolute_error, found.loss_relative_error) == (0.0, 0.0)
        assert (found.kl, found.top1_agreement) == (0.0, 1.0)


def test_different_shapes_are_refused(tmp_path: Path) -> None:
    cache = built(tmp_path / "cache", counting_teacher())
    exact = cache.lookup(IDS)
    for student, live_logits in ((exact[:, :2], exact), (exact, exact[:4])):
        with pytest.raises(ConfigError, match="logits of one shape"):
            cache.distortion(student, live_logits, IDS)
