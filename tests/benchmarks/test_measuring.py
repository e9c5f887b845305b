"""The parts that the benchmarks share compute what they say; times themselves prove nothing."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from measuring import machine, timing
from measuring.memory import saved_bytes
from measuring.models import WORKLOADS
from measuring.timing import Duration, Spread, in_turn, interleaved, ratios
from measuring.trainer import Trainer


def test_arms_take_turns_and_warm_up_rounds_are_not_counted():
    calls = []
    arms = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    durations = interleaved(arms, 4, warm_up=2, start=10)
    assert {name: len(own) for name, own in durations.items()} == {"a": 4, "b": 4, "c": 4}
    assert [number for _, number in calls] == [n for n in range(10, 16) for _ in range(3)]
    firsts = [name for name, _ in calls[::3]]
    assert set(firsts) == {"a", "b", "c"}


def test_an_arm_that_settles_is_called_before_it_is_timed():
    calls = []

    def first_slow(number):
        calls.append(number)
        time.sleep(0.02 if len(calls) % 2 else 0)

    (durations,) = interleaved({"a": first_slow}, 3, settle=True).values()
    assert calls == [0, 0, 1, 1, 2, 2]
    assert all(duration.passed < 0.02 for duration in durations)


def test_every_arm_has_every_place_equally_often():
    names = ["a", "b", "c"]
    orders = [in_turn(names, turn) for turn in range(6)]
    for place in range(3):
        assert sorted(order[place] for order in orders) == sorted(names * 2)
    assert orders[1] == orders[0][::-1]


def test_time_limits_the_rounds_but_leaves_three():
    durations = interleaved({"a": lambda number: time.sleep(0.01)}, 50, warm_up=50, seconds=0.001)
    assert len(durations["a"]) == 3


def test_durations_are_those_of_the_call():
    durations = interleaved({"slow": lambda number: time.sleep(0.02), "no": lambda number: 0}, 3)
    assert all(duration.passed >= 0.02 for duration in durations["slow"])
    assert all(duration.passed < 0.02 for duration in durations["no"])
    assert all(duration.cpu < 0.02 for duration in durations["slow"])


def test_ratios_are_taken_round_by_round():
    own, baseline = [Duration(2, 0), Duration(9, 0)], [Duration(1, 0), Duration(3, 0)]
    assert ratios(own, baseline) == [2, 3]
    assert timing.milliseconds(own) == 5500


def test_the_spread_is_median_and_quartiles():
    assert Spread.of([5, 1, 2, 3, 4]) == Spread(3, 2, 4)
    assert Spread.of([7.0]) == Spread(7, 7, 7)


def test_progress_names_what_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(timing, "REPORT_EVERY", -1)
    interleaved({"one": lambda number: 0}, 1, warm_up=1, label="model")
    shown = capsys.readouterr().err
    assert "model: warming up" in shown
    assert "model: 1 of 1 rounds, ms: one" in shown


def test_a_layer_keeps_its_input_once():
    linear, relu = nn.Linear(64, 64), nn.ReLU()

    def forward():
        hidden = relu(linear(torch.ones(32, 64)))  # the inner output is kept by nobody
        return (hidden @ hidden.T).sum()

    inputs = 32 * 64 * 4
    product, total = 32 * 32 * 4, 4
    assert saved_bytes(forward, linear) in (2 * inputs + total, 2 * inputs + product + total)


def test_tensors_without_memory_do_not_count():
    linear = nn.Linear(8, 8)
    with FakeTensorMode():
        kept = [torch.empty(4, 8)]
    assert saved_bytes(lambda: linear(torch.ones(4, 8)).sum(), linear) == 4 * 8 * 4 + 4
    assert len(kept) == 1


def test_what_a_function_puts_on_its_context_counts():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            ctx.kept = torch.zeros(1000)
            return input.sum()

        @staticmethod
        def backward(ctx, gradient):
            return None

    parameter = nn.Parameter(torch.ones(8))
    module = nn.ParameterList([parameter])
    assert saved_bytes(lambda: Hidden.apply(parameter), module) == 4000 + 4


def test_parameters_buffers_and_what_was_there_before_do_not_count():
    norm, before = nn.BatchNorm1d(16), torch.ones(32, 16)
    held = saved_bytes(lambda: norm(before).sum(), norm)
    assert held == 2 * 16 * 4 + 4  # mean and inverse deviation of the batch, and the sum


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_builds_the_same_network_and_learns(name):
    workload = WORKLOADS[name](shrink=8)
    first, second = workload.build(), workload.build()
    for own, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
    trainer = Trainer(first, optimizer=torch.optim.SGD(first.parameters(), lr=0.02))
    losses = [trainer.step(number, *workload.batches[0]) for number in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", WORKLOADS)
def test_batches_differ_and_have_the_memory_format(name):
    workload = WORKLOADS[name](shrink=8, batches=2)
    (first, _, ids), (second, _, more) = workload.batches
    assert not torch.equal(first, second)
    assert first.is_contiguous(memory_format=workload.memory_format)
    assert not set(ids.tolist()) & set(more.tolist())


def test_the_real_sizes_are_those_of_the_published_tables():
    encoder, resnet = WORKLOADS["encoder"](batches=1), WORKLOADS["resnet"](batches=1)
    assert encoder.inputs.shape == (16, 128, 512)
    assert resnet.inputs.shape == (32, 3, 32, 32)
    assert len(encoder.build().layers) == 4


def test_the_processor_is_described(tmp_path):
    information = tmp_path / "cpuinfo"
    information.write_text("model name\t: Xeon\nflags\t\t: fpu avx2 avx_vnni amx_int8\n")
    found = machine.features(information)
    assert [name for name, present in found.items() if present] == ["AVX2", "VNNI", "AMX-int8"]
    text = machine.in_words(machine.describe_machine() | {"features": found})
    assert "has AVX2, VNNI, AMX-int8, lacks AVX512, AVX512-BF16, AMX-bf16" in text
    assert torch.__version__ in text
