"""Of several builds of one cache at once, one goes on and the others are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cached_teachers
from cached_teachers import SAMPLES, batch, built, counting_teacher, live
from compression_manager import CheckpointError, ConfigError
from compression_plugins import TeacherCache

IDS = torch.arange(SAMPLES)
BUSY = r"cache is being built already, by another process or in this one\. Wait until"


def test_a_second_build_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    teacher, cache = counting_teacher(), TeacherCache(tmp_path / "cache")

    def batches() -> Iterator[Any]:
        yield batch(range(4))
        with pytest.raises(CheckpointError, match=BUSY):
            TeacherCache(tmp_path / "cache").build(teacher, [batch([0])], overwrite=True)
        yield batch(range(4, 8))

    cache.build(teacher, batches())
    assert cache.lookup(torch.arange(8)).shape == (8, 4)


def test_builds_one_after_the_other_are_allowed_whatever_ended_them(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(ConfigError, match="without a batch"):
            cache.build(counting_teacher(), [])
    cache.build(counting_teacher(), [batch([1])])


def test_a_build_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("new/deeper", "there"):
        with pytest.raises(ConfigError, match="without a batch"):
            TeacherCache(tmp_path / name).build(counting_teacher(), [])
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_cache_behind_a_link_is_the_same_cache(tmp_path: Path) -> None:
    teacher = counting_teacher()
    built(tmp_path / "cache", teacher)
    (tmp_path / "link").symlink_to(tmp_path / "cache")

    def batches() -> Iterator[Any]:
        with pytest.raises(CheckpointError, match="is being built already"):
            TeacherCache(tmp_path / "cache").build(teacher, [batch([0])])
        yield batch([100])

    TeacherCache(tmp_path / "link").build(teacher, batches())


CHILD = """
import sys, time
import cached_teachers
from compression_plugins import TeacherCache
def slow(teacher, inputs):
    output = teacher(inputs)
    print("running", flush=True)
    time.sleep(60)
    return output
loader = cached_teachers.loader(num_workers=1, multiprocessing_context="fork")
TeacherCache(sys.argv[1]).build(cached_teachers.counting_teacher(), loader, teacher_forward=slow)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks and no fork")
def test_a_killed_build_is_no_longer_in_the_way_although_its_workers_live_on(
    tmp_path: Path,
) -> None:
    teacher, cache = counting_teacher(), TeacherCache(tmp_path / "cache")
    paths = [str(Path(cached_teachers.__file__).parent), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "cache")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"running\n"
        with pytest.raises(CheckpointError, match=BUSY):
            cache.build(teacher, cached_teachers.loader())
        child.send_signal(signal.SIGKILL)
        child.wait()
        cache.build(teacher, cached_teachers.loader())
    torch.testing.assert_close(cache.lookup(IDS), live(teacher, IDS))
