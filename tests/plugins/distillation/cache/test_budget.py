"""The byte budget is checked before anything is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cached_teachers
from cached_teachers import batch, counting_teacher
from compression_manager import ConfigError
from compression_plugins import TeacherCache
from compression_plugins.distillation.cache.budget import check_budget, estimate
from compression_plugins.distillation.cache.encoding import Encoding

ALL = Encoding(None, "float32")
encodings = st.builds(
    Encoding, st.none() | st.integers(1, 50), st.sampled_from(["float32", "float16", "int8"])
)


@pytest.mark.parametrize("shard_size", [1, 1000])
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "dtype": "int8"}, {"dtype": "float16"}])
def test_the_estimate_is_an_upper_one(
    tmp_path: Path, options: dict[str, Any], shard_size: int
) -> None:
    cache = TeacherCache(tmp_path / "cache", shard_size=shard_size, **options)
    samples = 20 if shard_size == 1 else 2000
    cache.build(counting_teacher(200), cached_teachers.loader(samples, batch_size=shard_size))
    expected = estimate(samples, (200,), cache.encoding, shard_size)
    assert cache.size_bytes <= expected
    if shard_size == 1000:
        assert expected - cache.size_bytes < 3 * 2048  # what two shards and the index are given


def test_a_cache_beyond_the_budget_is_refused_before_writing(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", byte_budget=100_000)
    with pytest.raises(ConfigError, match=r"is 100,000, but 200 outputs .* take about 4") as error:
        cache.build(counting_teacher(500), cached_teachers.loader(200))
    assert not (tmp_path / "cache").exists()
    # (100000 - 2 * 2048) / 200 - 24 = 455 bytes per row; of k classes 6k + 4, 4k + 4 and 3k + 12.
    message = str(error.value)
    assert (
        "top_k=75, dtype='float32'; top_k=112, dtype='float16'; top_k=147, dtype='int8'" in message
    )


@given(encodings, st.integers(1, 5000), st.integers(52, 2000), st.integers(0, 10**7))
def test_what_the_message_names_fits_and_one_class_more_does_not(
    encoding: Encoding, rows: int, classes: int, budget: int
) -> None:
    try:
        check_budget(budget, 0, rows, (classes,), encoding, 512)
    except ConfigError as error:
        message = str(error)
    else:
        assert estimate(rows, (classes,), encoding, 512) <= budget
        return
    assert estimate(rows, (classes,), encoding, 512) > budget
    named = re.findall(r"(?:top_k=(\d+), )?dtype='(\w+)'", message.split("bytes")[-1])
    for top_k, dtype in named:
        kept = int(top_k) if top_k else None
        assert estimate(rows, (classes,), Encoding(kept, dtype), 512) <= budget
        if kept is not None and kept + 1 < classes:
            assert estimate(rows, (classes,), Encoding(kept + 1, dtype), 512) > budget
    for dtype in {"float32", "float16", "int8"} - {dtype for _, dtype in named}:
        assert estimate(rows, (classes,), Encoding(1, dtype), 512) > budget


def test_all_seeds_share_the_budget(tmp_path: Path) -> None:
    teacher = counting_teacher()
    first = TeacherCache(tmp_path / "cache")
    first.build(teacher, cached_teachers.loader())
    cache = TeacherCache(tmp_path / "cache", byte_budget=first.size_bytes + 3000)
    cache.build(teacher, cached_teachers.loader())  # complete: nothing to write
    with pytest.raises(ConfigError, match=f"beside the {first.size_bytes:,} that it takes already"):
        cache.build(teacher, cached_teachers.loader(), augmentation_seed=1)
    assert cache.augmentation_seeds == [0]


def test_a_list_of_batches_beyond_the_budget_is_refused_before_writing(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", byte_budget=20_000, shard_size=16)
    batches = [batch(range(start, start + 16)) for start in range(0, 1600, 16)]
    with pytest.raises(ConfigError, match=r"but 1,600 outputs"):
        cache.build(counting_teacher(), batches)
    assert not (tmp_path / "cache").exists()


def test_a_part_of_the_data_set_needs_the_room_of_that_part(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", byte_budget=estimate(16, (4,), ALL, 16384))
    cache.build(counting_teacher(), cached_teachers.loader(sampler=range(16)))
    assert cache.lookup(torch.arange(16)).shape == (16, 4)


def test_a_loader_of_unknown_length_stops_at_the_budget(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", byte_budget=20_000, shard_size=16)
    endless = (batch(range(start, start + 16)) for start in range(0, 10**6, 16))
    with pytest.raises(ConfigError, match="byte_budget"):
        cache.build(counting_teacher(), endless)
    assert 10_000 < cache.size_bytes <= 20_000
    assert torch.is_grad_enabled()
