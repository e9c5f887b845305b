"""The benchmark runs, and its figures are those of what it timed."""

from __future__ import annotations

import json

import pytest
import torch

import training_step
from measuring import variants
from measuring.timing import Duration
from measuring.variants import FLOAT, VARIANTS, Unavailable, VariantTrainer, warm_cache

BY_NAME = {variant.name: variant for variant in VARIANTS}
FAKE, AUTO, DISTILLED = BY_NAME["fake"], BY_NAME["auto-torch"], BY_NAME["distilled-fake"]
TINY = ["--shrink", "8", "--steps", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_figure_is_shown_and_written(tmp_path, capsys):
    arguments = [*TINY, "--models", "encoder", "--variants", "fake", "distilled-fake"]
    path, image = tmp_path / "results" / "steps.json", tmp_path / "steps.png"
    results = training_step.main([*arguments, "--json", str(path), "--chart", str(image)])
    assert [item.variant for item in results] == ["float32", "fake", "distilled-fake"]
    baseline, fake, distilled = results
    assert (baseline.ratio, baseline.quartiles, baseline.saved_ratio) == (1, (1, 1), 1)
    assert fake.saved_ratio == pytest.approx(fake.saved_mib / baseline.saved_mib)
    assert fake.saved_ratio > 1.2  # fake quantization keeps masks
    assert distilled.steps == 3
    document = json.loads(path.read_text())
    assert document["machine"]["threads"] == 1
    assert [item["ratio"] for item in document["results"]] == [item.ratio for item in results]
    shown = capsys.readouterr().out
    for item in results:
        assert str(item) in shown
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def _vnni(monkeypatch):
    monkeypatch.setattr(
        variants, "features", lambda: {"VNNI": True, "AVX512-BF16": False, "AMX-bf16": False}
    )


@pytest.mark.usefixtures("_vnni")
def test_ratios_are_to_the_float32_step_of_the_same_round():
    durations = {
        "float32": [Duration(0.1, 1), Duration(0.2, 1), Duration(0.4, 1)],
        "auto-torch": [Duration(0.3, 2), Duration(0.4, 2), Duration(0.4, 2)],
    }
    result = training_step._result(
        "resnet", AUTO, durations, {"float32": 2**21, "auto-torch": 2**20}
    )
    assert result.ratio == pytest.approx(2)
    assert result.quartiles == (pytest.approx(1.5), pytest.approx(2.5))
    assert (result.cpu_ratio, result.milliseconds) == (2, 400)
    assert (result.saved_mib, result.saved_ratio, result.bar) == (1, 0.5, 0.97)
    assert training_step.verdicts([result]) == [
        "resnet, torch ops: ratio 2.000 misses the bar of 0.97",
        "resnet, torch ops: saved 0.500 meets the bar of 0.75",
    ]


def test_the_bar_follows_the_processor_and_the_size(monkeypatch):
    monkeypatch.setattr(variants, "features", lambda: {"VNNI": True})
    assert [AUTO.bar("encoder"), AUTO.bar("small-encoder"), FAKE.bar("encoder")] == [
        0.95,
        1.3,
        None,
    ]
    monkeypatch.setattr(variants, "features", lambda: {"VNNI": False})
    assert [AUTO.bar("encoder"), AUTO.bar("small-encoder"), FAKE.bar("encoder")] == [1.3, 1.3, None]


@pytest.mark.usefixtures("_vnni")
def test_what_cannot_run_here_is_listed_with_the_reason(tmp_path, capsys):
    arguments = [*TINY, "--models", "resnet", "--variants", "bfloat16", "bfloat16x3"]
    results = training_step.main([*arguments, "--json", str(tmp_path / "steps.json")])
    shown = capsys.readouterr().out
    for result, instructions in zip(results[1:], ("AVX512-BF16", "AMX-bf16"), strict=True):
        assert result.skipped == f"the processor has no {instructions}"
        assert result.ratio is None
        assert f"skipped: {result.skipped}" in shown


def test_without_native_kernels_their_variants_are_unavailable(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSION_MANAGER_NATIVE", "0")
    workload = training_step.WORKLOADS["encoder"](8)
    cache = warm_cache(workload, tmp_path / "cache")
    native = next(variant for variant in VARIANTS if variant.name == "auto-native")
    with pytest.raises(Unavailable, match="COMPRESSION_MANAGER_NATIVE=0"):
        VariantTrainer(native, workload, cache)


def test_the_variants_do_train(tmp_path):
    workload = training_step.WORKLOADS["resnet"](8)
    cache = warm_cache(workload, tmp_path / "cache")
    losses = {}
    for variant in (FLOAT, FAKE, DISTILLED):
        trainer = VariantTrainer(variant, workload, cache)
        before = [parameter.clone() for parameter in trainer.trainer.model.parameters()]
        for number in range(2):
            trainer.step(number)
        assert not all(map(torch.equal, before, trainer.trainer.model.parameters()))
        losses[variant.name] = trainer.loss(2).item()
    assert len(set(losses.values())) == 3
