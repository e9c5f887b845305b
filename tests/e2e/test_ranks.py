"""Quantization-aware training under DistributedDataParallel on two ranks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import toys
from compression_manager import StartAt, prepare_compression
from compression_manager.quantization import HistogramCalibration, QuantizationScheme
from compression_plugins import CalibrationConfig, CheckpointConfig, LearnedScaleConfig, QATConfig
from rank_runs import on_ranks

SCHEMES = {
    "weight": QuantizationScheme(bits=4, granularity="channel"),
    "activation": QuantizationScheme(bits=4, symmetric=False, signed=False),
}
OBSERVERS: dict[str, Any] = {
    "min_max": "min_max",
    "moving_average": "moving_average",
    "histogram": HistogramCalibration(bins=256),
}
FREEZE, STEPS = 4, 8
LEARNED = {
    "adam": (torch.optim.AdamW, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
}


def configs(observer: Any, *, learned: bool = False, synchronize: bool = True) -> list[Any]:
    return [
        QATConfig(**SCHEMES, freeze_observers_at=StartAt(step=FREEZE)),
        CalibrationConfig(observer, synchronize=synchronize),
        *([LearnedScaleConfig()] if learned else []),
    ]


def batches(rank: int | None) -> list[list[Tensor]]:
    """A rank's half of every batch; None: both."""
    inputs, targets = toys.vectors(16 * STEPS).tensors
    # The scales of the halves differ, so that a rank alone would find another range.
    inputs = inputs * torch.tensor([1.0, 3.0]).repeat_interleave(8).repeat(STEPS).unsqueeze(1)
    part = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
    return [[inputs[i : i + 16][part], targets[i : i + 16][part]] for i in range(0, 16 * STEPS, 16)]


def train(
    rank: int | None, plugins: list[Any], kind: Any, *, broadcast: bool = False, **options: Any
) -> dict[str, Any]:
    """Train on one rank, or on all data in one process; return what is compared."""
    torch.manual_seed(rank or 0)  # DDP hands rank 0's first weights out
    model = toys.mlp()
    manager = prepare_compression(model, plugins)
    called = model if rank is None else DistributedDataParallel(model, broadcast_buffers=broadcast)
    optimizer = kind(model.parameters(), 0.01, **options)
    manager.track(optimizer=optimizer)
    frozen: dict[str, Tensor] = {}
    for _ in manager.epochs(1):
        for step, (inputs, targets) in manager.steps(batches(rank)):
            if step == FREEZE + 1:
                frozen = scales(model)
            output = called(inputs)
            loss = manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            optimizer.zero_grad()
    converted = manager.convert(toys.vectors().tensors[0])
    return {
        "model": dict(model.state_dict()),
        "converted": dict(converted.state_dict()),
        "steps_of_scales": [
            float(value["step"])
            for parameter, value in optimizer.state.items()
            if "step" in value and parameter in set(optimizer.param_groups[-1]["params"])
        ],
        "frozen": frozen,
        "scales": scales(model),
    }


def scales(model: nn.Module) -> dict[str, Tensor]:
    """What an input is quantized with."""
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if "input_quantizer." in name
        and name.rpartition(".")[2] in ("scale", "zero_point", "log_scale", "zero_fraction")
    }


def run(rank: int | None) -> dict[str, dict[str, Any]]:
    results = {
        name: train(rank, configs(observer), torch.optim.SGD)
        for name, observer in OBSERVERS.items()
    }
    for name, (kind, options) in LEARNED.items():
        results[name] = train(
            rank, configs("min_max", learned=True), kind, broadcast=True, **options
        )
    if rank is not None:
        plugins = configs("min_max", synchronize=False)
        results["apart"] = train(rank, plugins, torch.optim.SGD)
    return results


def interrupted(rank: int, folder: Path, stop_after: int | None) -> tuple[dict[str, Tensor], int]:
    """Train with dropout on, and a folder of checkpoints for each rank."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, toys.CLASSES))
    checkpoints = CheckpointConfig(folder / f"rank-{rank}", save_every_steps=1)
    manager = prepare_compression(model, [*configs("min_max", learned=True), checkpoints])
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    manager.track(optimizer=optimizer)
    begins = manager.resume(checkpoints.directory, missing_ok=True).global_step
    called = DistributedDataParallel(model)
    for _ in manager.epochs(1):
        for _, (inputs, targets) in manager.steps(batches(rank)):
            output = called(inputs)
            loss = manager.on_after_compute_loss(inputs, output, F.cross_entropy(output, targets))
            loss.backward()
            manager.on_before_optimizer_step()
            optimizer.step()
            manager.on_after_optimizer_step()
            optimizer.zero_grad()
            if manager.position.global_step == stop_after:
                break
        if stop_after is not None:
            break
    manager.close()
    return dict(model.state_dict()), begins


def resume(rank: int) -> tuple[Any, ...]:
    """What an uninterrupted training and an interrupted one end with, and where that began anew."""
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = interrupted(rank, Path(folder, "whole"), None)
        interrupted(rank, Path(folder, "parts"), FREEZE + 1)
        return whole, *interrupted(rank, Path(folder, "parts"), None)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(run, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def single():
    return run(None)


@pytest.mark.parametrize("case", [*OBSERVERS, *LEARNED])
def test_all_ranks_hold_the_same_model_and_convert_it_to_the_same_integers(ranks, case):
    first, second = (rank[case] for rank in ranks)
    toys.assert_identical(second["model"], first["model"])
    toys.assert_identical(second["converted"], first["converted"])
    integers = (torch.int8, torch.uint8)
    assert any(value.dtype in integers for value in first["converted"].values())


def test_without_synchronization_ranks_differ(ranks):
    first, second = (rank["apart"]["model"] for rank in ranks)
    name = "0.input_quantizer.observer.maximum"
    assert not torch.equal(first[name], second[name])


@pytest.mark.parametrize("case", [*OBSERVERS, *LEARNED])
def test_the_first_layer_observes_what_one_process_with_all_data_observes(ranks, single, case):
    expected = {
        n: v for n, v in single[case]["model"].items() if n.startswith("0.input_quantizer.observer")
    }
    for rank in ranks:
        toys.assert_identical({n: rank[case]["model"][n] for n in expected}, expected)


@pytest.mark.parametrize("case", [*OBSERVERS, *LEARNED])
def test_the_trained_model_is_that_of_one_process_with_all_data(ranks, single, case):
    for name, value in single[case]["model"].items():
        torch.testing.assert_close(
            ranks[0][case]["model"][name],
            value,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("case", [*OBSERVERS, *LEARNED])
def test_frozen_scales_stay(ranks, case):
    for rank in ranks:
        assert rank[case]["frozen"]
        toys.assert_identical(rank[case]["scales"], rank[case]["frozen"])


def test_optimizers_take_as_many_steps_with_scales_as_in_one_process(ranks, single):
    """Gradients that only DDP needs reach no optimizer."""
    expected = single["adam"]["steps_of_scales"]
    assert sorted(set(expected)) == [FREEZE - 1, STEPS - 1]
    for rank in ranks:
        assert rank["adam"]["steps_of_scales"] == expected


@pytest.mark.slow
def test_every_rank_resumes_from_checkpoints_of_its_own_with_the_same_bits(tmp_path):
    first, second = on_ranks(resume, tmp_path)
    for whole, resumed, begins in (first, second):
        assert 0 < begins < STEPS
        toys.assert_identical(resumed, whole)
    toys.assert_identical(second, first)
