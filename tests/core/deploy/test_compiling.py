"""`compile` without the compiler, which the conformance suite runs: checks and counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toys
from compression_manager import deploy
from compression_manager.deploy import CompiledModel
from compression_manager.errors import ConfigError, NotExportableError, ParityError
from compression_manager.integrations import inductor
from compression_manager.quantization.integer.selection import reference_arithmetic
from quantization_reference import prepared, trained

VECTORS = toys.vectors().tensors[0]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return trained(toys.mlp(), VECTORS).convert()


def compiler(monkeypatch: pytest.MonkeyPatch, make: Callable[[Any], Any]) -> None:
    """Let `make` be torch.compile."""
    monkeypatch.setattr(inductor.torch, "compile", make)


def test_a_compiled_model_says_how_many_layers_run_on_kernels(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def matching(module: Any) -> Any:
        def run(*args: Any) -> Any:
            inductor.counters["inductor"]["qlinear_weight_prepack_matcher_count"] += 2
            return module(*args)

        return run

    compiler(monkeypatch, matching)
    monkeypatch.setattr(inductor, "int8_kernels_are_exact", lambda: True)
    with reference_arithmetic():  # which is what the module that is compiled computes
        result = deploy.compile(model, VECTORS)
    assert (result.int8_kernels, result.layers, result.output_error) == (2, 2, 0)
    assert "2 of 2 layers on 8-bit kernels, relative error" in repr(result)
    monkeypatch.setattr(inductor, "int8_kernels_are_exact", lambda: False)
    assert deploy.compile(model, VECTORS).layers == 0


def test_a_model_that_is_not_compared_has_no_error() -> None:
    assert repr(CompiledModel(lambda: None, 2)) == "CompiledModel(0 of 2 layers on 8-bit kernels)"


def test_a_call_needs_no_settings_once_its_shapes_are_known(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = []

    def recording(module: Any) -> Any:
        def run(*args: Any) -> Any:
            frozen.append(torch._inductor.config.freezing)
            assert not torch.is_grad_enabled()
            return module(*args)

        return run

    compiler(monkeypatch, recording)
    result = deploy.compile(model, VECTORS)
    frozen.clear()
    for inputs in (VECTORS, VECTORS[:3], VECTORS[:3], VECTORS[:1]):
        with reference_arithmetic():
            assert torch.equal(result(inputs), model(inputs))
    assert frozen == [False, True, False, True]
    assert not torch._inductor.config.freezing


def test_the_batch_is_left_open_in_a_copy_of_the_inputs(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    compiler(monkeypatch, lambda module: lambda x: seen.append(x) or module(x))
    deploy.compile(model, VECTORS)
    assert seen[0]._dynamo_dynamic_indices == {0}
    assert not hasattr(VECTORS, "_dynamo_dynamic_indices")
    seen.clear()
    deploy.compile(model, VECTORS[:1])
    assert not hasattr(seen[0], "_dynamo_dynamic_indices")


def test_other_outputs_are_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(monkeypatch, lambda module: lambda x: module(x) * 1.1)
    with pytest.raises(
        ParityError, match=r"the compiled model at batch size .* relative error 0.1"
    ):
        deploy.compile(model, VECTORS)


def test_a_failing_compiler_is_named(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no C++ compiler")

    compiler(monkeypatch, lambda module: fail)
    with pytest.raises(NotExportableError, match=r"torch\.compile fails on the model: .*no C"):
        deploy.compile(model, VECTORS)


def test_a_model_of_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile takes a converted model; layer '0'"):
        deploy.compile(prepared(toys.mlp(), [VECTORS]).model, VECTORS)
