"""A build that ends at any moment is resumed or refused, and a damaged file is never used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import cached_teachers
from cached_teachers import SAMPLES, built, counting_teacher, live
from compression_manager import CheckpointCorruptError, CheckpointError
from compression_plugins import TeacherCache

IDS = torch.arange(SAMPLES)
# Every call through which a build changes the disk.
WRITES = ("mkdir", "rename", "replace", "fsync", "chmod", "unlink", "rmdir")


class Stopped(BaseException):
    """Stands for a kill: nothing that handles errors may catch it."""


class StopAt:
    """Raises at the n-th call that changes the disk, and at every later one, as after a kill."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        self.count, self.limit = 0, limit
        for name in WRITES:
            monkeypatch.setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count >= self.limit:
                raise Stopped
            return function(*args, **kwargs)

        return call


def _writes_of_a_build(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        stop = StopAt(patch, 10**9)
        built(folder, counting_teacher())
    return stop.count


def test_a_build_that_stops_anywhere_is_resumed(tmp_path: Path) -> None:
    teacher = counting_teacher()
    total = _writes_of_a_build(tmp_path / "whole")
    assert total > 40
    exact = live(teacher, IDS)
    resumed = 0
    for limit in range(1, total + 1):
        folder = tmp_path / f"stopped-{limit}"
        with pytest.MonkeyPatch.context() as patch:
            StopAt(patch, limit)
            with pytest.raises(Stopped):
                built(folder, teacher)
        cache = TeacherCache(folder)
        if cache.augmentation_seeds:
            torch.testing.assert_close(cache.lookup(IDS), exact)
        else:
            with pytest.raises(CheckpointError, match=r"Call cache\.build"):
                cache.lookup(IDS)
        teacher.calls.clear()
        cache.build(teacher, cached_teachers.loader())
        resumed += len(teacher.calls) < 7
        torch.testing.assert_close(cache.lookup(IDS), exact)
    assert resumed > total / 2


CHILD = """
import sys
import cached_teachers
from compression_plugins import TeacherCache
teacher = cached_teachers.counting_teacher()
cache = TeacherCache(sys.argv[1], shard_size=2)
print("ready", flush=True)
cache.build(teacher, cached_teachers.loader(batch_size=1))
"""


def test_a_killed_process_leaves_a_cache_that_resumes(tmp_path: Path) -> None:
    teacher = counting_teacher()
    folder = tmp_path / "cache"
    paths = [str(Path(cached_teachers.__file__).parent), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        while not list(folder.glob("seed-0/shard-*")) and child.poll() is None:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
    assert not (folder / "seed-0" / "index").exists()
    cache = TeacherCache(folder, shard_size=2)
    cache.build(teacher, cached_teachers.loader(batch_size=1))
    assert len(teacher.calls) < SAMPLES
    torch.testing.assert_close(cache.lookup(IDS), live(teacher, IDS))
    assert not list(folder.rglob("*.tmp-*"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove"])
def test_a_damaged_file_is_refused_by_name_and_built_again(tmp_path: Path, damage: str) -> None:
    teacher = counting_teacher()
    exact = live(teacher, IDS)
    count = len(_files(built(tmp_path / "cache", teacher).directory))
    assert count == 10  # four shards and the index, each with its manifest
    for number in range(count):
        folder = tmp_path / f"{damage}-{number}"
        built(folder, teacher)
        path = _files(folder)[number]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.unlink()
        if damage != "remove":
            path.write_bytes(content if damage == "flip" else content[:-1])
        cache = TeacherCache(folder)
        with pytest.raises(CheckpointCorruptError) as error:
            cache.lookup(IDS)
        assert path.parent.name in str(error.value)
        assert "Call cache.build(teacher, loader, augmentation_seed=0)" in str(error.value)
        teacher.calls.clear()
        cache.build(teacher, cached_teachers.loader())
        assert len(teacher.calls) == (0 if path.parent.name == "index" else 2 if number < 8 else 1)
        torch.testing.assert_close(cache.lookup(IDS), exact)


@pytest.mark.parametrize("name", ["manifest.json", "notes.txt"])
def test_what_others_put_there_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    teacher = counting_teacher()
    cache = built(tmp_path / "cache", teacher)
    shard = tmp_path / "cache" / "seed-0" / "shard-00000001"
    (shard / "manifest.json").unlink()
    (shard / name).write_text("{}")
    for call in (
        lambda: TeacherCache(tmp_path / "cache").lookup(IDS),
        lambda: cache.build(teacher, cached_teachers.loader()),
    ):
        with pytest.raises(CheckpointError, match=r"shard-00000001 is not a"):
            call()
    assert (shard / name).read_text() == "{}"


def test_a_missing_shard_is_refused_and_built_again(tmp_path: Path) -> None:
    teacher = counting_teacher()
    built(tmp_path / "cache", teacher)
    (tmp_path / "cache" / "seed-0" / "shard-00000001").rename(tmp_path / "elsewhere")
    cache = TeacherCache(tmp_path / "cache")
    with pytest.raises(CheckpointCorruptError, match="shard-00000001 is missing"):
        cache.lookup(IDS)
    cache.build(teacher, cached_teachers.loader())
    torch.testing.assert_close(cache.lookup(IDS), live(teacher, IDS))


def test_a_shard_from_another_cache_is_refused(tmp_path: Path) -> None:
    teacher = counting_teacher()
    built(tmp_path / "cache", teacher)
    other = TeacherCache(tmp_path / "other", shard_size=16)
    other.build(teacher, cached_teachers.loader(shuffle=True))
    place = Path("seed-0") / "shard-00000001"
    (tmp_path / "cache" / place).rename(tmp_path / "elsewhere")
    (tmp_path / "other" / place).rename(tmp_path / "cache" / place)
    with pytest.raises(CheckpointCorruptError, match="not the shard that the index was made for"):
        TeacherCache(tmp_path / "cache").lookup(IDS)


def test_a_seed_under_another_name_is_refused(tmp_path: Path) -> None:
    built(tmp_path / "cache", counting_teacher())
    (tmp_path / "cache" / "seed-0").rename(tmp_path / "cache" / "seed-1")
    with pytest.raises(CheckpointCorruptError, match="written for the augmentation seed 0, not 1"):
        TeacherCache(tmp_path / "cache").lookup(IDS, augmentation_seed=1)
