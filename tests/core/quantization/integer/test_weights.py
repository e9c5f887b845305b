"""Integers of weights are computed once for each value of the weight, however it changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.optimizer import _global_optimizer_post_hooks

from compression_manager import prepare_compression
from compression_manager.quantization.integer.selection import use_passes
from compression_manager.quantization.integer.weights import forget_weights
from compression_plugins import PTQConfig, QATConfig
from integer_layers import Counting, quantized


def _layer(range_of: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return quantized(nn.Linear(8, 4), range_of)


@pytest.fixture
def counting() -> Iterator[Counting]:
    passes = Counting()
    with use_passes(passes):
        yield passes


def test_weights_are_quantized_once_for_accumulated_gradients_and_evaluation(
    counting: Counting,
) -> None:
    input = torch.randn(6, 8)
    layer = _layer(input)
    for _ in range(3):
        layer(input).sum().backward()
    assert counting.weights == 1
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            layer(input)
    assert counting.weights == 2  # once more, because weights may be exchanged for evaluation


def test_a_changed_weight_is_quantized_anew(counting: Counting) -> None:
    input = torch.randn(6, 8)
    layer = _layer(input)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for count in range(1, 4):
        layer(input).sum().backward()
        optimizer.step()
        assert counting.weights == count


@pytest.mark.parametrize("change", ["replaced", "written and forgotten", "written before eval"])
def test_weights_changed_behind_autograd_are_seen(counting: Counting, change: str) -> None:
    input = torch.randn(6, 8)
    layer = _layer(input)
    layer(input)
    weight = layer.get_parameter("weight")
    if change == "replaced":
        weight.data = torch.randn(4, 8)
    else:
        weight.data.mul_(-1.0)
    if change == "written and forgotten":
        forget_weights(layer.quantizers())
    if change == "written before eval":
        layer.eval()
    expected = copy.deepcopy(layer)(input)
    assert torch.equal(layer(input), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_setting_the_mode_that_a_layer_is_in_shows_single_values_written_through_data(
    counting: Counting, mode: bool
) -> None:
    """Which the sample may miss."""
    torch.manual_seed(0)
    input = torch.randn(6, 64)
    layer = quantized(nn.Linear(64, 64), input).train(mode)
    layer(input)
    for row in range(10):
        layer.get_parameter("weight").data[row, row] = 9.0
        layer.train(mode)
        assert torch.equal(layer(input), copy.deepcopy(layer)(input))


def test_a_copy_has_integers_of_its_own(counting: Counting) -> None:
    input = torch.randn(6, 8)
    layer = _layer(input)
    before = layer(input)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.get_parameter("weight").mul_(-1.0)
    assert not torch.equal(twin(input), before)
    assert torch.equal(layer(input), before)


@pytest.mark.parametrize("factor", [-1.0, 1.0 + 2.0**-20])
def test_weights_written_through_data_are_seen(counting: Counting, factor: float) -> None:
    input = torch.randn(6, 8)
    layer = _layer(input)
    layer(input)
    layer.get_parameter("weight").data.mul_(factor)
    layer(input)
    assert counting.weights == 2


def test_temporary_weights_at_the_same_address_are_told_apart(counting: Counting) -> None:
    torch.manual_seed(0)
    input, values = torch.randn(6, 64), torch.randn(64, 64)
    layer = quantized(nn.Linear(64, 64, bias=False), input)
    for count in range(1, 21):
        weight = values.clone()
        weight[count, count] = 9.0  # the sample misses nearly all of these
        functional_call(layer, {"weight": weight}, (input,))
        assert counting.weights == count
        del weight


def test_a_perturbed_weight_is_quantized_and_the_restored_one_again(counting: Counting) -> None:
    input = torch.randn(6, 8)
    layer = _layer(input)
    vector, expected = parameters_to_vector(layer.parameters()).detach(), layer(input)
    for seed in range(10):
        noise = torch.randn(len(vector), generator=torch.Generator().manual_seed(seed))
        vector_to_parameters(vector + noise, layer.parameters())
        assert not torch.equal(layer(input), expected)
        vector_to_parameters(vector, layer.parameters())
        assert torch.equal(layer(input), expected)


def test_what_inference_mode_quantized_can_be_trained_with(counting: Counting) -> None:
    input = torch.randn(6, 8)
    layer = _layer(input)
    with torch.inference_mode():
        expected = layer(input)
    output = layer(input)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert counting.weights == 1


class _Assigning(torch.optim.Optimizer):
    """Leaves no trace in autograd's counter, and changes a single weight in each step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.view(-1)[self.steps] += 1.0
        self.steps += 1


@pytest.mark.parametrize(
    "build",
    [lambda p: torch.optim.AdamW(p, 0.05, fused=True), _Assigning],
    ids=["fused", "through data"],
)
def test_optimizers_that_leave_no_trace_train(build: Callable[..., Any]) -> None:
    def losses(forward: Any) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32, bias=False))
        manager = prepare_compression(model, [QATConfig(forward=forward)])
        optimizer, inputs = build(model.parameters()), torch.randn(16, 64)
        manager.track(optimizer=optimizer)
        found = []
        for _ in manager.epochs(1):
            for _, batch in manager.steps([inputs] * 6):
                loss = manager.on_after_compute_loss(batch, None, model(batch).square().mean())
                found.append(float(loss.detach()))
                optimizer.zero_grad()
                loss.backward()
                manager.on_before_optimizer_step()
                optimizer.step()
        manager.close()
        return found

    assert losses("integer") == pytest.approx(losses("fake"), rel=1e-5)
    assert len(set(losses("integer"))) == 6


@pytest.mark.parametrize(("is_trained", "count"), [(True, 3), (False, 1)])
def test_a_step_of_another_optimizer_forgets_what_is_trained(
    counting: Counting, is_trained: bool, count: int
) -> None:
    """It may have shards of the weight, which leave no trace when they are gathered again."""
    layer, input = _layer(torch.randn(6, 8)), torch.randn(6, 8)
    layer.get_parameter("weight").requires_grad_(is_trained)
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1)
    for _ in range(3):
        layer(input)
        optimizer.step()
    assert counting.weights == count


def test_the_hook_behind_a_step_shows_what_no_optimizer_of_torch_wrote(counting: Counting) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    trained, frozen = (model.get_submodule(name).get_parameter("weight") for name in "01")
    frozen.requires_grad_(False)
    manager = prepare_compression(model, [QATConfig(forward="integer")])
    manager.on_train_begin()
    counts = []
    for step in range(4):
        manager.on_step_begin(step)
        output = model(torch.randn(16, 64))
        manager.on_after_compute_loss(None, output, output.sum()).backward()
        manager.on_before_optimizer_step()
        trained.data[step, step] += 1.0  # the sample misses nearly all of these
        manager.on_after_optimizer_step()
        manager.on_step_end()
        counts.append(counting.weights)
    assert counts == [0, 2, 3, 4]
    manager.close()


def test_models_quantized_after_training_are_watched_as_well() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(16, 64)
    manager = prepare_compression(model, [PTQConfig(calibration_data=[inputs])])
    optimizer = _Assigning(model.parameters())
    outputs = []
    for _ in range(3):
        outputs.append(model(inputs).detach())
        optimizer.step()
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    manager.close()


def test_one_hook_watches_all_optimizers() -> None:
    for _ in range(2):
        layer = _layer(torch.randn(6, 8))
        layer(torch.randn(6, 8))
    names = [hook.__name__ for hook in _global_optimizer_post_hooks.values()]
    assert names.count("_forget_stepped") == 1
