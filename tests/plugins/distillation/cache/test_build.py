"""Filling a cache: what is run, kept, skipped and refused."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import cached_teachers
import toys
from cached_teachers import SAMPLES, batch, built, counting_teacher
from compression_manager import CheckpointCorruptError, CheckpointMismatchError, ConfigError
from compression_plugins import IndexedDataset, TeacherCache
from toy_teachers import CountingTeacher


def test_a_finished_cache_is_not_built_again(tmp_path: Path) -> None:
    teacher = counting_teacher()
    built(tmp_path / "cache", teacher)
    assert len(teacher.calls) == 7
    before = _files(tmp_path)
    read: list[int] = []
    loader = cached_teachers.loader(shuffle=True)
    loader.collate_fn = _counting(read)
    TeacherCache(tmp_path / "cache").build(teacher, loader)
    assert len(teacher.calls) == 7
    assert len(read) == 1  # one batch tells
    assert _files(tmp_path) == before


def _counting(read: list[int]) -> Any:
    def collate(items: list[Any]) -> Any:
        read.append(len(items))
        return torch.utils.data.default_collate(items)

    return collate


def _files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_ino, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_only_batches_with_new_samples_reach_the_teacher(tmp_path: Path) -> None:
    teacher, cache = counting_teacher(), TeacherCache(tmp_path / "cache")
    cache.build(teacher, [batch(range(24))])
    calls = len(teacher.calls)
    cache.build(teacher, [batch(range(8)), batch([7, 100, 101]), batch([102])])
    assert len(teacher.calls) == calls + 2
    assert torch.equal(cache.lookup(torch.tensor([102])), teacher(batch([102])[0]))
    assert cache.lookup(torch.arange(24)).shape == (24, toys.CLASSES)


def test_other_samples_in_equal_number_are_built(tmp_path: Path) -> None:
    teacher, cache = counting_teacher(), TeacherCache(tmp_path / "cache")
    cache.build(teacher, [batch(range(8))])
    cache.build(teacher, [batch(range(8, 16))])
    assert cache.lookup(torch.arange(16)).shape == (16, toys.CLASSES)


def test_nothing_but_the_cache_is_changed(tmp_path: Path) -> None:
    teacher = CountingTeacher(nn.Sequential(toys.mlp(), nn.Dropout(0.5)))
    teacher.train()
    teacher.inner[0][0].eval()
    modes = [module.training for module in teacher.modules()]
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    loader = cached_teachers.loader(shuffle=True, generator=generator)
    states = torch.get_rng_state(), random.getstate(), generator.get_state()
    TeacherCache(tmp_path / "cache").build(teacher, loader)
    assert [module.training for module in teacher.modules()] == modes
    toys.assert_identical(dict(teacher.state_dict()), weights)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(generator.get_state(), states[2])


def test_the_teacher_runs_in_eval_mode_without_gradient(tmp_path: Path) -> None:
    modes = []

    def forward(teacher: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        output = teacher(inputs)
        modes.append((teacher.training, output.requires_grad))
        return output

    teacher = toys.mlp().train()
    cache = TeacherCache(tmp_path / "cache")
    cache.build(teacher, [batch([1, 2])], teacher_forward=forward)
    assert modes == [(False, False)]


@pytest.mark.parametrize("name", ["sample_ids", "labels"])
def test_mappings_are_passed_by_keyword_without_ids_and_labels(tmp_path: Path, name: str) -> None:
    teacher = counting_teacher()
    inputs, labels, ids = batch([5, 6])
    cache = TeacherCache(tmp_path / "cache")
    cache.build(teacher, [{"x": inputs, "labels": labels, "sample_ids": ids}])
    assert name not in teacher.calls[0][1]
    assert torch.equal(cache.lookup(ids), teacher(inputs))


def test_functions_take_other_batches_apart(tmp_path: Path) -> None:
    teacher = CountingTeacher(toys.mlp(), wrap=lambda logits: {"scores": logits})
    inputs, _, ids = batch([5, 6])
    cache = TeacherCache(tmp_path / "cache")
    cache.build(
        teacher,
        [(ids, inputs)],
        inputs_of=lambda item: item[1],
        ids_of=lambda item: item[0],
        teacher_output="scores",
    )
    assert torch.equal(cache.lookup(ids), teacher(inputs)["scores"])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda x, y, i: (x, y), "got a tuple of 2 parts; wrap the data set in IndexedDataset"),
        (lambda x, y, i: x, "got a Tensor; wrap"),
        (lambda x, y, i: {"x": x, "y": y}, "needs a key 'sample_ids' in each batch, got x, y"),
        (lambda x, y, i: (x, y, i.float()), r"TeacherCache.build takes sample ids as an integer"),
        (lambda x, y, i: (x, y, i[:1]), r"1 sample ids, but .* expected \(1, \*, classes\)"),
    ],
)
def test_batches_without_ids_are_refused(tmp_path: Path, item: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TeacherCache(tmp_path / "cache").build(counting_teacher(), [item(*batch([1, 2]))])
    assert not _files(tmp_path)


def test_a_repeated_sample_is_stored_once(tmp_path: Path) -> None:
    teacher, cache = counting_teacher(), TeacherCache(tmp_path / "cache", shard_size=2)
    cache.build(teacher, [batch([1, 2, 1]), batch([3, 2]), batch([3, 3, 1])])
    assert len(cache._rows(0)._ids) == 3
    exact = teacher(batch([3, 1])[0]).detach()
    torch.testing.assert_close(cache.lookup(torch.tensor([3, 1])), exact)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"dtype": "int8"}, {"shard_size": 1}])
@pytest.mark.parametrize("where", ["same batch", "later batch"])
def test_a_sample_with_two_outputs_is_refused(
    tmp_path: Path, options: dict[str, Any], where: str
) -> None:
    teacher = counting_teacher()
    other = torch.full((1, 6), 4.0)
    batches = [batch([1, 2, 3]), batch([2], other)]
    if where == "same batch":
        batches = [batch([1, 2, 2], torch.cat([batch([1, 2])[0], other]))]
    with pytest.raises(ConfigError, match=r"sample id 2, .* differ by .* two samples share the id"):
        TeacherCache(tmp_path / "cache", **options).build(teacher, batches)


@pytest.mark.parametrize(("change", "is_refused"), [(0.01, False), (0.03, True)])
def test_two_outputs_of_a_sample_may_differ_by_two_percent(
    tmp_path: Path, change: float, is_refused: bool
) -> None:
    outputs = torch.tensor([[8.0, 0.0, -1.0]])
    batches = [batch([1], outputs), batch([1], outputs * (1 + change))]
    cache = TeacherCache(tmp_path / "cache")
    if is_refused:
        with pytest.raises(ConfigError, match=r"sample id 1, .* differ by 0\.24"):
            cache.build(nn.Identity(), batches)
    else:
        cache.build(nn.Identity(), batches)
        assert torch.equal(cache.lookup(torch.tensor([1])), outputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    inputs = batch([4, 9])[0]
    inputs[1, 0] = value
    with pytest.raises(ConfigError, match="sample id 9 are not finite"):
        TeacherCache(tmp_path / "cache").build(toys.mlp(), [batch([4, 9], inputs)])


def test_outputs_of_different_shapes_are_refused(tmp_path: Path) -> None:
    batches = [batch([1], torch.randn(1, 5, 6)), batch([2], torch.randn(1, 7, 6))]
    with pytest.raises(ConfigError, match=r"id 2 have \(7, 4\), earlier ones \(5, 4\)\. Pad all"):
        TeacherCache(tmp_path / "cache").build(toys.mlp(), batches)


def test_an_empty_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without a batch"):
        TeacherCache(tmp_path / "cache").build(toys.mlp(), [])


def test_an_iterable_data_set_is_built(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            data = toys.vectors(20)
            yield from ((*data[index], index * 10) for index in range(20))

    teacher, cache = counting_teacher(), TeacherCache(tmp_path / "cache", byte_budget=10**6)
    cache.build(teacher, DataLoader(Stream(), batch_size=8))
    cache.build(teacher, DataLoader(Stream(), batch_size=8))
    assert len(teacher.calls) == 3
    assert cache.lookup(torch.tensor([190])).shape == (1, toys.CLASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocessing": "resize-64"}, "preprocessing is 'resize-32', here 'resize-64'"),
        ({"preprocessing": "resize-32", "top_k": 2}, "top_k is None, here 2"),
        ({"preprocessing": "resize-32", "dtype": "int8"}, "dtype is 'float32', here 'int8 with an"),
    ],
)
def test_outputs_of_something_else_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    teacher = counting_teacher()
    built(tmp_path / "cache", teacher, preprocessing="resize-32")
    before = _files(tmp_path)
    other = TeacherCache(tmp_path / "cache", **options)
    calls = (
        lambda: other.lookup(torch.tensor([1])),
        lambda: other.build(teacher, cached_teachers.loader()),
        lambda: other.build(teacher, cached_teachers.loader(), augmentation_seed=5),
    )
    for call in calls:
        with pytest.raises(CheckpointMismatchError, match=message):
            call()
    assert _files(tmp_path) == before


def test_another_teacher_is_refused_until_it_may_overwrite(tmp_path: Path) -> None:
    cache = built(tmp_path / "cache", counting_teacher())
    other = counting_teacher(seed=1)
    with pytest.raises(CheckpointMismatchError, match="teacher_sha256 is '"):
        cache.check(other)
    with pytest.raises(CheckpointMismatchError, match=r"replace it with build\(\.\.\., overwrite"):
        cache.build(other, cached_teachers.loader())
    cache.build(other, cached_teachers.loader(), overwrite=True)
    cache.check(other)
    ids = torch.arange(SAMPLES)
    torch.testing.assert_close(cache.lookup(ids), cached_teachers.live(other, ids))


def test_what_another_process_built_anew_is_read_after_a_check(tmp_path: Path) -> None:
    teacher, other, ids = counting_teacher(), counting_teacher(seed=1), torch.arange(SAMPLES)
    cache = built(tmp_path / "cache", teacher)
    before = cache.lookup(ids)
    TeacherCache(tmp_path / "cache").build(other, cached_teachers.loader(), overwrite=True)
    expected = cached_teachers.live(other, ids)
    assert not torch.equal(before, expected)
    cache.check(other)
    torch.testing.assert_close(cache.lookup(ids), expected)
    cache.build(teacher, cached_teachers.loader(), overwrite=True)
    TeacherCache(tmp_path / "cache").build(other, cached_teachers.loader(), overwrite=True)
    cache.verify()
    torch.testing.assert_close(cache.lookup(ids), expected)


def test_a_file_that_is_damaged_after_it_was_read_is_found_by_verify(tmp_path: Path) -> None:
    cache = built(tmp_path / "cache", counting_teacher())
    cache.lookup(torch.arange(SAMPLES))
    file = max((tmp_path / "cache").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointCorruptError):
        cache.verify()


def test_overwriting_removes_nothing_for_a_call_that_fails_at_once(tmp_path: Path) -> None:
    built(tmp_path / "cache", counting_teacher())
    before = _files(tmp_path)
    calls = [
        ({"byte_budget": 100}, cached_teachers.loader()),
        ({"top_k": 9}, cached_teachers.loader()),
        ({}, [batch([1, 2])[:2]]),
    ]
    for options, loader in calls:
        cache = TeacherCache(tmp_path / "cache", **options)
        with pytest.raises(ConfigError):
            cache.build(counting_teacher(seed=1), loader, overwrite=True)
        assert _files(tmp_path) == before


def test_overwriting_keeps_what_fits(tmp_path: Path) -> None:
    teacher = counting_teacher()
    cache = built(tmp_path / "cache", teacher)
    before = _files(tmp_path)
    cache.build(teacher, cached_teachers.loader(), overwrite=True)
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    "options",
    [{"shard_size": 0}, {"byte_budget": 0}, {"preprocessing": 3}, {"directory": 5}],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options)).replace("directory", "path")):
        TeacherCache(**{"directory": tmp_path, **options})


def test_workers_may_load_the_batches(tmp_path: Path) -> None:
    teacher = counting_teacher()
    cache = TeacherCache(tmp_path / "cache")
    cache.build(teacher, cached_teachers.loader(num_workers=1))
    assert cache.lookup(torch.tensor([SAMPLES - 1])).shape == (1, toys.CLASSES)
    assert isinstance(cached_teachers.loader().dataset, IndexedDataset)


def test_a_shard_of_another_teacher_is_not_taken_over(tmp_path: Path) -> None:
    teacher = counting_teacher()
    built(tmp_path / "cache", teacher)
    built(tmp_path / "other", counting_teacher(seed=1))
    own, other = (tmp_path / name / "seed-0" for name in ("cache", "other"))
    (own / "index").rename(tmp_path / "index")
    (own / "shard-00000001").rename(tmp_path / "shard")
    (other / "shard-00000001").rename(own / "shard-00000001")
    with pytest.raises(CheckpointMismatchError, match=r"shard-00000001 .* teacher_sha256 is"):
        TeacherCache(tmp_path / "cache").build(teacher, cached_teachers.loader())


def test_an_extension_that_ended_before_its_index_is_finished(tmp_path: Path) -> None:
    teacher, cache = counting_teacher(), TeacherCache(tmp_path / "cache")
    cache.build(teacher, [batch(range(8))])
    index = tmp_path / "cache" / "seed-0" / "index"
    shutil.copytree(index, tmp_path / "older")
    cache.build(teacher, [batch(range(8, 16))])
    shutil.rmtree(index)
    (tmp_path / "older").rename(index)
    calls = len(teacher.calls)
    cache = TeacherCache(tmp_path / "cache")
    assert cache.lookup(torch.arange(8)).shape == (8, toys.CLASSES)  # as before the extension
    cache.build(teacher, [batch(range(16))])
    assert len(teacher.calls) == calls
    exact = teacher(batch(range(16))[0]).detach()
    torch.testing.assert_close(TeacherCache(tmp_path / "cache").lookup(torch.arange(16)), exact)
