"""Functions that a model keeps as attributes call the copy, not what they were made for."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.deploy.parity import check_parity
from compression_manager.deploy.replacement import Replacement
from compression_manager.errors import ParityError, QuantizationError
from compression_manager.models.copying import copy_model
from quantization_reference import trained

VECTORS = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.head(self.block(input))
        return output


class Caller:
    """Calls what it was given, as accelerate's wrappers do."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def called_by_object(function: Callable[..., Any]) -> Callable[..., Any]:
    caller = Caller(function)

    def call(*args: Any) -> Any:
        return caller(*args)

    return call


def hooked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Count calls in a default argument, and call through a partial function."""

    def call(inner: Callable[..., Any], *args: Any, factor: float = 1.0) -> Any:
        return inner(*args) * factor

    return functools.partial(call, called_by_object(function))


WRAPPERS = {
    "torch.compile": functools.partial(torch.compile, backend="eager"),
    "autocast": torch.autocast("cpu", dtype=torch.float16, enabled=False),
    "object": called_by_object,
    "partial": hooked,
    "compiled within": lambda function: called_by_object(torch.compile(function, backend="eager")),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("after", [False, True], ids=["before preparing", "after preparing"])
@pytest.mark.parametrize("place", ["", "block"], ids=["whole model", "a block"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_forward_calls_the_converted_layers(name: str, place: str, after: bool) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        owner = model.get_submodule(place)
        owner.forward = WRAPPERS[name](owner.forward)
        return model

    torch.manual_seed(0)
    model = Net()
    manager = trained(model if after else wrap(model), VECTORS)
    if after:
        wrap(model)
    converted = manager.convert()
    before = converted(VECTORS)
    assert "ConvertedLinear" in type(converted.get_submodule("block.0")).__name__
    with torch.no_grad():
        model.block[0].weight.mul_(3)
    assert torch.equal(converted(VECTORS), before)
    with torch.no_grad():
        converted.get_submodule("block.0").bias.add_(1)
    assert not torch.equal(converted(VECTORS), before)


def test_functions_that_know_nothing_of_the_model_are_shared() -> None:
    lock = threading.Lock()

    def locked(value: Tensor) -> Tensor:
        with lock:
            return value + 1

    model = Net()
    model.change = locked
    assert copy_model(model, keep_user_hooks=False).change is locked


def test_what_cannot_be_copied_is_refused() -> None:
    model, lock = Net(), threading.Lock()
    inner = model.forward

    class Locked:
        def __init__(self) -> None:
            self.lock, self.function = lock, inner

        def __call__(self, input: Tensor) -> Any:
            return self.function(input)

    caller = Locked()
    model.forward = lambda input: caller(input)
    with pytest.raises(QuantizationError, match="cannot be copied"):
        copy_model(model, keep_user_hooks=False)
    assert model(VECTORS).shape == (16, 4)


def test_a_converted_layer_that_is_not_called_is_named() -> None:
    model = Net()
    converted = trained(model, VECTORS).convert()
    layers = {"block.0": converted.get_submodule("block.0")}
    replacements = [Replacement(name, layer) for name, layer in layers.items()]
    converted.block = nn.Sequential(model.block[0], nn.ReLU())
    with pytest.raises(ParityError, match=r"does not call its layer 'block\.0'"):
        check_parity(model.eval(), converted, replacements, VECTORS)
