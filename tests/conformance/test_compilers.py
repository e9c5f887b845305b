"""What torch's compiler makes of a converted model computes what the model computes, at any batch.

Where the processor's 8-bit kernels overflow, compiled models compute in float32; the kernels
themselves are then compared on weights so small that nothing overflows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compression_manager import deploy
from compression_manager.deploy.parity import MODEL_TOLERANCE
from compression_manager.integrations import inductor
from compression_manager.models.calling import call_model, tensors_in
from compression_manager.quantization import QuantizableAdd
from compression_manager.quantization.integer.selection import reference_arithmetic
from conformance_models import CASES, converted
from quantization_reference import trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

Runner = Callable[..., Any]
ALLOWED = 2e-3
# Linear layers and convolutions; the CNN and the ResNet compute their first layer, over a single
# channel, in float32.
LAYERS = {
    "demo CNN": 3, "ResNet": 9, "residual blocks": 7, "encoder": 7, "attention": 4, "embedding": 2,
    "BERT": 8,
}  # fmt: skip


@functools.cache
def reference(name: str) -> nn.Module:
    return converted(CASES[name])


def overflow_free(model: nn.Module) -> nn.Module:
    """Halve the integer weights, so that no pair of 8-bit products leaves 16 bits."""
    for module in model.modules():
        weight = module._buffers.get("weight")
        if weight is not None and weight.dtype == torch.int8:
            weight.copy_(weight // 2)
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@functools.cache
def compiled(name: str) -> deploy.CompiledModel:
    """The model, compiled; the batch size of the examples is none of those tested."""
    return deploy.compile(reference(name), CASES[name].inputs(5, seed=10))


@functools.cache
def packaged(name: str, folder: Path) -> Runner:
    path = folder / f"{name}.pt2"
    deploy.export(reference(name), path, "aot_inductor", CASES[name].inputs(5, seed=10))
    return torch._inductor.aoti_load_package(path)


def check(run: Runner, model: nn.Module, name: str, batch: int, allowed: float) -> None:
    """Compare with sums of integers and with those of float32, one of which `run` has.

    Sums in another order let a value between two integers fall on the other one, a whole step away,
    in a sample now and then: the worst ones need only be within the library's own tolerance.
    """
    inputs = CASES[name].inputs(batch, seed=batch)
    with torch.no_grad():
        actual = [item.clone() for item in tensors_in(call_model(run, inputs))]
        # What is written to the inputs, or to constants, shows in the next call.
        again = tensors_in(call_model(run, inputs))
    assert all(torch.equal(*pair) for pair in zip(actual, again, strict=True))
    fresh = CASES[name].inputs(batch, seed=batch)
    assert all(map(torch.equal, tensors_in(inputs), tensors_in(fresh)))
    errors = []
    for arithmetic in (nullcontext(), reference_arithmetic()):
        with torch.no_grad(), arithmetic:
            expected = list(tensors_in(call_model(model, inputs)))
        assert [item.shape for item in actual] == [item.shape for item in expected]
        assert max(_error(*pair) for pair in zip(expected, actual, strict=True)) <= MODEL_TOLERANCE
        rare = 0 if batch == 1 else 1 + batch // 32
        errors.append(max(_error(*pair, rare) for pair in zip(expected, actual, strict=True)))
    assert min(errors) <= allowed


def _error(wanted: torch.Tensor, got: torch.Tensor, rare: int = 0) -> float:
    """Return the relative root mean square error, without that of the `rare` worst samples."""
    wanted64, got64 = (item.double().flatten(1) for item in (wanted, got))
    squares = (got64 - wanted64).square().sum(1).sort().values[: len(got64) - rare]
    return float((squares.sum() / wanted64.square().sum()).sqrt())


@pytest.mark.parametrize("batch", [7, 64, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_model_returns_the_outputs_of_the_converted_model(name: str, batch: int) -> None:
    check(compiled(name), reference(name), name, batch, ALLOWED)


@pytest.mark.parametrize("name", CASES)
def test_all_layers_run_on_8_bit_kernels_where_these_are_exact(name: str) -> None:
    expected = LAYERS[name] if inductor.int8_kernels_are_exact() else 0
    assert compiled(name).int8_kernels == compiled(name).layers == expected


@pytest.mark.parametrize("batch", [7, 64, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_package_returns_the_outputs_of_the_converted_model(
    name: str, batch: int, folder: Path
) -> None:
    check(packaged(name, folder), reference(name), name, batch, ALLOWED)


@pytest.mark.parametrize("name", ["demo CNN", "encoder"])
def test_8_bit_kernels_compute_what_the_converted_model_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "int8_kernels_are_exact", lambda: True)
    model = overflow_free(converted(CASES[name]))
    run = deploy.compile(model, CASES[name].inputs(5, seed=10))
    assert run.int8_kernels == run.layers == LAYERS[name]
    for batch in (7, 64):
        check(run, model, name, batch, ALLOWED)


class Residual(nn.Module):
    """Adds the results of linear layers to its input, and to a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.constant = nn.Parameter(torch.randn(1, 3, 16))

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(input) + input, self.second(input) + self.constant


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("packs", [False, True], ids=["compiled", "package"])
def test_inputs_and_constants_are_not_added_to_in_place(
    batch: int, packs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "int8_kernels_are_exact", lambda: True)
    torch.manual_seed(0)
    examples = torch.randn(batch, 3, 16)
    model = overflow_free(trained(Residual(), examples).convert())
    if packs:
        deploy.export(model, tmp_path / "model.pt2", "aot_inductor", examples)
        run = torch._inductor.aoti_load_package(tmp_path / "model.pt2")
    else:
        run = deploy.compile(model, examples)
        assert run.int8_kernels == run.layers == 2
    inputs = torch.randn(batch, 3, 16)
    with torch.no_grad():
        wanted = model(inputs)
        before = inputs.clone()
        for _ in range(3):
            for item, expected in zip(run(inputs), wanted, strict=True):
                torch.testing.assert_close(item, expected)
    assert torch.equal(inputs, before)


def test_a_package_holds_8_bit_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "int8_kernels_are_exact", lambda: True)
    model = overflow_free(converted(CASES["embedding"]))
    path = tmp_path / "model.pt2"
    with inductor.counting_kernels() as count:
        deploy.export(model, path, "aot_inductor", CASES["embedding"].inputs(5, seed=10))
    assert count() == LAYERS["embedding"]
    run = deploy.load_exported(path)
    assert run.format == "aot_inductor"
    for batch in (1, 64):
        check(run, model, "embedding", batch, ALLOWED)


class Shifted(nn.Module):
    """Adds a constant, quantized, to the result of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shift = QuantizableAdd()
        constant = torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)
        self.constant = nn.Parameter(constant)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.shift(self.first(images), self.constant).relu())


@pytest.mark.parametrize("batch", [1, 5])
def test_a_quantized_constant_is_not_added_to_in_place(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "int8_kernels_are_exact", lambda: True)
    torch.manual_seed(0)
    images = torch.randn(batch, 8, 6, 6).to(memory_format=torch.channels_last)
    model = overflow_free(trained(Shifted(), images).convert())
    run = deploy.compile(model, images)
    assert run.int8_kernels == run.layers == 2
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(images), model(images), rtol=1e-3, atol=1e-3)


class Turned(nn.Module):
    """Convolutions, and a linear layer over the transposed result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(images).relu()).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("packs", [False, True], ids=["compiled", "package"])
def test_inputs_may_lie_in_memory_in_any_way(
    packs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "int8_kernels_are_exact", lambda: True)
    torch.manual_seed(0)
    images = torch.randn(5, 3, 7, 7)
    model = overflow_free(trained(Turned(), images).convert())
    if packs:
        deploy.export(model, tmp_path / "model.pt2", "aot_inductor", images)
        run: Runner = deploy.load_exported(tmp_path / "model.pt2")
    else:
        run = deploy.compile(model, images)
    last = images.to(memory_format=torch.channels_last)
    for input in (images, last, images.transpose(2, 3), last[1:], last[:1], images[::2]):
        with torch.no_grad(), inductor.counting_kernels() as count:
            torch.testing.assert_close(run(input), model(input), rtol=1e-3, atol=1e-3)
        # What is compiled anew for another layout has 8-bit kernels as well.
        assert packs or input is not last or count() == 3


class Activated(nn.Module):
    """Adds its input, quantized, to what an activation returned."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.activation, self.add = activation, QuantizableAdd()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.add(self.activation(self.first(images)), images))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.ReLU6])
def test_a_quantized_residual_may_follow_an_activation(
    activation: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "int8_kernels_are_exact", lambda: True)
    torch.manual_seed(0)
    images = torch.randn(4, 8, 6, 6)
    model = overflow_free(trained(Activated(activation()), images).convert())
    run = deploy.compile(model, images)
    assert run.int8_kernels == run.layers == 2
    with torch.no_grad():
        torch.testing.assert_close(run(images), model(images), rtol=1e-3, atol=1e-3)
