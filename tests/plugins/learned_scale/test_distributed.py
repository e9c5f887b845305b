"""Learned scales in a process group: gradients that DistributedDataParallel waits for."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import toys
from compression_manager import StartAt, prepare_compression
from compression_manager.quantization import (
    MinMaxObserver,
    QuantizationScheme,
    QuantizationSite,
)
from compression_plugins import LearnedScaleConfig, QATConfig
from compression_plugins.learned_scale import LearnedScaleQuantizer
from compression_plugins.learned_scale.arithmetic import ZeroGradient
from rank_runs import on_ranks, process_group

CONFIGS = [
    QATConfig(
        weight=QuantizationScheme(bits=4, granularity="channel"),
        activation=QuantizationScheme(bits=4, symmetric=False, signed=False),
        fake_quantize_at=StartAt(step=2),
        freeze_observers_at=StartAt(step=4),
    ),
    LearnedScaleConfig(),
]


def quantizers(model: nn.Module) -> list[LearnedScaleQuantizer]:
    return [module for module in model.modules() if isinstance(module, LearnedScaleQuantizer)]


def train(model: nn.Module, *, wrapped: bool, watch: Any = None) -> dict[str, Tensor]:
    manager = prepare_compression(model, CONFIGS)
    called = DistributedDataParallel(model) if wrapped else model
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    manager.track(optimizer=optimizer)
    for _ in manager.epochs(1):
        for step, (inputs, targets) in manager.steps(toys.loader(toys.images(48), shuffle=False)):
            output = called(inputs)
            loss = F.cross_entropy(output, targets)
            loss = manager.on_after_compute_loss(inputs, output, loss)
            loss.backward()
            if watch is not None:
                watch(step, model)
            manager.on_before_optimizer_step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def test_training_through_ddp_on_one_rank_gives_the_same_bits_as_without_it(tmp_path):
    torch.manual_seed(0)
    model = toys.ConvNet()
    expected = train(copy.deepcopy(model), wrapped=False)
    with process_group(tmp_path):
        toys.assert_identical(train(model, wrapped=True), expected)


def test_parameters_without_part_in_the_output_have_a_gradient_of_zero(tmp_path):
    seen = []

    def watch(step, model):
        for quantizer in quantizers(model):
            learns = step >= 2 and (step < 4 or quantizer.site.role == "weight")
            gradients = [parameter.grad for parameter in quantizer.parameters()]
            assert all(gradient is not None for gradient in gradients)
            assert learns or not any(bool(gradient.any()) for gradient in gradients)
            seen.append((step, learns and any(bool(gradient.any()) for gradient in gradients)))

    with process_group(tmp_path):
        train(toys.ConvNet(), wrapped=True, watch=watch)
    assert {step for step, learns in seen if learns} == {2, 3, 4, 5}


def test_without_a_process_group_there_is_no_such_gradient():
    def watch(step, model):
        learns = any(p.grad is not None for q in quantizers(model) for p in q.parameters())
        assert learns == (step >= 2)

    train(toys.ConvNet(), wrapped=False, watch=watch)


def test_zero_gradient_passes_its_input_and_the_gradient_on():
    input = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    parameter = torch.randn(2, requires_grad=True)
    output = ZeroGradient.apply(input, parameter, None)
    assert torch.equal(output, input)
    output.square().sum().backward()
    assert torch.equal(input.grad, 2 * input.detach())
    assert torch.equal(parameter.grad, torch.zeros(2))


# Two ranks --------------------------------------------------------------------------------------

SCHEMES = {
    "tensor": QuantizationScheme(bits=4, symmetric=False, signed=False),
    "channel": QuantizationScheme(bits=4, granularity="channel", axis=1),
}
# What rank 0 and rank 1 observe, step by step.
PARTS = [
    (torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[10.0, 4.0]])),
    (torch.tensor([[float("nan"), 1.0]]), torch.tensor([[7.0, 1.0]])),
    (torch.zeros(0, 2), torch.tensor([[-6.0, 2.0]])),
    (torch.zeros(0, 2), torch.zeros(0, 2)),
]


def observe(rank: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name, scheme in SCHEMES.items():
        site = QuantizationSite("layer", "activation", 2)
        observer = MinMaxObserver(scheme, site)
        observer.synchronize = True
        quantizer = LearnedScaleQuantizer(
            scheme, site, observer, gradient_scaling=False, minimum_scale=1e-7
        )
        quantizer.set_phase(observing=True, quantizing=False)
        for parts in PARTS:
            quantizer(parts[rank])
        quantizer.set_phase(observing=True, quantizing=True)
        quantizer.start()
        results[name] = dict(quantizer.state_dict())
    return results


def test_scales_start_from_what_all_ranks_observed(tmp_path):
    first, second = on_ranks(observe, tmp_path)
    toys.assert_identical(second, first)
    magnitudes = [torch.cat(parts).double().abs() for parts in (PARTS[0], PARTS[2])]
    assert first["tensor"]["batches"] == 2
    for name, dims in (("tensor", (0, 1)), ("channel", 0)):
        expected = torch.stack([values.mean(dims) for values in magnitudes]).mean(0)
        torch.testing.assert_close(first[name]["magnitude"].double(), expected)
        assert first[name]["started"]
    # The smaller of 2 * mean|v| / sqrt(Q) and the largest value / Q, with Q = 7.
    expected = torch.minimum(
        2 * first["channel"]["magnitude"] / 7**0.5, torch.tensor([10.0, 4.0]) / 7
    )
    torch.testing.assert_close(first["channel"]["log_scale"].exp(), expected)
