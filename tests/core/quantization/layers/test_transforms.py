"""Quantized layers under the transforms of torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization.layers.decisions import last_decision
from compression_manager.quantization.layers.relu import BitMaskReLU
from integer_layers import quantized

FORWARD = ["fake", "auto", "integer"]


def _model(forward: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(6, 8)
    # A narrower range than the inputs', so that some elements are clipped.
    first = quantized(nn.Linear(8, 12), inputs * 0.7, forward)
    second = quantized(nn.Linear(12, 3), first(inputs).relu(), forward)
    return nn.Sequential(first, BitMaskReLU(), second).eval(), inputs


@pytest.mark.parametrize("forward", FORWARD)
def test_a_mapped_model_gives_what_it_gives_row_by_row(forward: str) -> None:
    model, inputs = _model(forward)
    outputs = torch.func.vmap(model)(inputs)
    decision = last_decision(model[0].parts()[""])
    if forward == "fake":
        assert decision is None
    else:
        assert decision is not None
        assert decision.reason.startswith("torch.func or forward mode runs")
    expected = torch.stack([model(row) for row in inputs])
    assert (outputs - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("forward", FORWARD)
def test_gradients_of_each_sample_are_those_of_a_batch_of_one(forward: str) -> None:
    model, inputs = _model(forward)
    values = {name: value.detach() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        output = torch.func.functional_call(model, (parameters, buffers), (row[None],))
        return output.square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, inputs)
    for index, row in enumerate(inputs):
        model.zero_grad()
        model(row[None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][index], parameter.grad)


def test_gradients_of_inputs_are_cleared_where_they_were_clipped() -> None:
    model, inputs = _model("auto")
    gradients = torch.func.grad(lambda values: model(values).sum())(inputs)
    leaf = inputs.clone().requires_grad_()
    model(leaf).sum().backward()
    assert bool((gradients == 0).any())
    torch.testing.assert_close(gradients, leaf.grad)


@pytest.mark.parametrize("forward", FORWARD)
def test_gradients_from_outside_of_a_mapped_model(forward: str) -> None:
    model, inputs = _model(forward)
    parameters = list(model.parameters())
    found = torch.autograd.grad(torch.func.vmap(model)(inputs).square().sum(), parameters)
    expected = torch.autograd.grad(model(inputs).square().sum(), parameters)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_gradients_of_several_models_at_once() -> None:
    models: list[nn.Module] = [_model("auto")[0] for _ in range(3)]
    inputs = _model("auto")[1]
    for factor, model in enumerate(models, start=1):
        for parameter in model.parameters():
            parameter.data.mul_(factor)
    stacked, _ = torch.func.stack_module_state(models)
    buffers = dict(models[0].named_buffers())

    def output(parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(models[0], (parameters, buffers), (inputs,))
        return result

    found = torch.autograd.grad(
        torch.func.vmap(output)(stacked).square().sum(), list(stacked.values())
    )
    for index, model in enumerate(models):
        own = dict(model.named_parameters())
        expected = torch.autograd.grad(output(own).square().sum(), list(own.values()))
        for gradient, other in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient[index], other)


# torch itself scripts decompositions when forward mode is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("forward", FORWARD)
def test_forward_mode_gives_what_backward_mode_gives(forward: str) -> None:
    model, inputs = _model(forward)
    ahead = torch.func.jacfwd(model)(inputs[:2])
    behind = torch.func.jacrev(model)(inputs[:2])
    assert bool((ahead != 0).any())
    torch.testing.assert_close(ahead, behind)
    tangent = torch.ones(2, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[:2], tangent)
        _, pushed = torch.autograd.forward_ad.unpack_dual(model(dual))
    torch.testing.assert_close(pushed, (ahead * tangent).sum((-1, -2)))
