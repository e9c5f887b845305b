"""Reading outputs by sample id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cached_teachers
import toys
from cached_teachers import batch, built, counting_teacher, live
from compression_manager import CheckpointError, ConfigError, prepare_compression
from compression_plugins import DistillationConfig, TeacherCache
from compression_plugins.distillation.losses import kd_loss
from toy_teachers import criterion


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_that_of_the_live_teacher(tmp_path: Path, temperature: float) -> None:
    teacher = counting_teacher()
    cache = built(tmp_path / "cache", teacher)
    student = torch.randn(8, toys.CLASSES)
    for inputs, _, ids in cached_teachers.loader():
        exact = teacher(inputs)
        cached = cache.lookup(ids)
        assert torch.equal(cached, exact)
        own = student[: len(ids)]
        assert torch.equal(kd_loss(own, cached, temperature), kd_loss(own, exact, temperature))


def test_training_with_a_cache_equals_training_with_the_teacher(tmp_path: Path) -> None:
    teacher = counting_teacher()
    cache = built(tmp_path / "cache", teacher)

    def losses(cached: bool) -> list[float]:
        torch.manual_seed(1)
        student = toys.mlp()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        config = (
            DistillationConfig(teacher_outputs="caller", criterion=criterion())
            if cached
            else DistillationConfig(teacher, criterion=criterion())
        )
        result = []
        with prepare_compression(student, [config]) as manager:
            for _ in manager.epochs(2):
                for _, (inputs, targets, ids) in manager.steps(cached_teachers.loader()):
                    output = student(inputs)
                    loss = F.cross_entropy(output, targets)
                    answer = cache.lookup(ids) if cached else None
                    loss = manager.on_after_compute_loss(inputs, output, loss, answer)
                    loss.backward()
                    manager.on_before_optimizer_step()
                    optimizer.step()
                    optimizer.zero_grad()
                    result.append(loss.item())
        return result

    expected = losses(cached=False)
    calls = len(teacher.calls)
    assert losses(cached=True) == expected
    assert len(teacher.calls) == calls


def test_rows_come_from_all_shards_in_the_order_of_the_ids(tmp_path: Path) -> None:
    teacher = counting_teacher()
    built(tmp_path / "cache", teacher)
    cache = TeacherCache(tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "seed-0").glob("shard-*"))) == 4
    for ids in ([49, 0, 17, 33, 0], [20, 21], list(range(50)), [48]):
        torch.testing.assert_close(
            cache.lookup(torch.tensor(ids)), live(teacher, torch.tensor(ids))
        )
    assert cache.lookup(torch.empty(0, dtype=torch.int64)).shape == (0, toys.CLASSES)


def test_ids_may_be_any_integers(tmp_path: Path) -> None:
    teacher, ids = counting_teacher(), [2**62, -5, 0, -(2**63), 2**63 - 1, 7]
    cache = TeacherCache(tmp_path / "cache")
    cache.build(teacher, [batch(ids)])
    assert torch.equal(cache.lookup(torch.tensor(ids)), teacher(batch(ids)[0]))
    for missing in (6, 8, 2**63 - 2, -(2**63) + 1):
        with pytest.raises(
            ConfigError, match=f"no output for the sample id {missing};.* 6 samples"
        ):
            cache.lookup(torch.tensor([7, missing]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_ids_of_other_integer_types_are_found(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher = counting_teacher()
    cache = built(tmp_path / "cache", teacher)
    ids = torch.tensor([4, 30])
    assert torch.equal(cache.lookup(ids.to(dtype)), cache.lookup(ids))


@pytest.mark.parametrize("ids", [[1, 2], torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor(1)])
def test_what_is_no_batch_of_ids_is_refused(tmp_path: Path, ids: Any) -> None:
    cache = built(tmp_path / "cache", counting_teacher())
    with pytest.raises(ConfigError, match=r"TeacherCache\.lookup takes sample ids as an integer"):
        cache.lookup(ids)


@pytest.mark.parametrize(("top_k", "dtype"), [(None, "float32"), (2, "float16"), (3, "int8")])
def test_outputs_of_sequences_keep_their_shape(
    tmp_path: Path, top_k: int | None, dtype: str
) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 9))  # (batch, 3, 9)
    cache = TeacherCache(tmp_path / "cache", top_k=top_k, dtype=dtype, shard_size=4)
    ids = list(range(10))
    cache.build(teacher, [batch(ids[:6]), batch(ids[6:])])
    exact = teacher(batch(ids)[0]).detach()
    cached = cache.lookup(torch.tensor(ids))
    assert cached.shape == (10, 3, 9)
    assert cache.sample_shape() == (3, 9)
    kept = exact.topk(top_k or 9).indices
    torch.testing.assert_close(
        cached.gather(-1, kept), exact.gather(-1, kept), rtol=0, atol=0.02 if top_k else 1e-6
    )


def test_seeds_have_outputs_of_their_own(tmp_path: Path) -> None:
    teacher, cache = counting_teacher(), TeacherCache(tmp_path / "cache")
    ids = torch.tensor([0, 1])
    for seed in (0, 3):
        cache.build(
            teacher, [batch([0, 1], torch.full((2, 6), float(seed)))], augmentation_seed=seed
        )
    assert cache.augmentation_seeds == [0, 3]
    assert torch.equal(cache.lookup(ids, augmentation_seed=3), teacher(torch.full((2, 6), 3.0)))
    with pytest.raises(CheckpointError, match=r"nothing was built there \(complete .* 0, 3\)"):
        cache.lookup(ids, augmentation_seed=2)


def test_a_cache_that_was_never_built_says_so(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"nothing was built there\. Call cache\.build"):
        cache.verify()
    with pytest.raises(CheckpointError, match=r"no outputs of a teacher yet\. Call cache\.build"):
        _ = cache.teacher_sha256
    assert (cache.size_bytes, cache.augmentation_seeds) == (0, [])


def test_outputs_are_mapped_not_read(tmp_path: Path) -> None:
    # 64 MB, of which the lookups touch a little.
    teacher = nn.Linear(6, 2**16, bias=False)
    cache = TeacherCache(tmp_path / "cache", shard_size=64)
    cache.build(teacher, [batch(range(start, start + 64)) for start in range(0, 256, 64)])
    cache.lookup(torch.tensor([1]))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no list of mapped files on this system")
    assert sum(str(tmp_path) in line for line in maps.read_text().splitlines()) >= 4


@pytest.mark.parametrize("missing", [-1, cached_teachers.SAMPLES])
def test_ids_beyond_both_ends_are_refused(tmp_path: Path, missing: int) -> None:
    cache = built(tmp_path / "cache", counting_teacher())
    with pytest.raises(
        ConfigError, match=f"sample id {missing} and 1 more of the batch; .* 0 to 49"
    ):
        cache.lookup(torch.tensor([3, missing, missing]))
