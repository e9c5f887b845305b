"""Every exported file computes what the converted model computes, at any batch size.

The files are run by their runtimes alone, without this package's own code for it, and compared
in float64. Allowed is a tenth of what `export` allows, and less. As there, a file may follow the
model's sums of integers or those of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compression_manager import deploy
from compression_manager.deploy.formats import FORMATS
from compression_manager.deploy.parity import MODEL_TOLERANCE
from compression_manager.models.calling import call_model, tensors_in
from compression_manager.quantization.integer.selection import reference_arithmetic
from conformance_models import CASES, converted

pytestmark = pytest.mark.slow

ALLOWED = {"onnx": 2e-3, "openvino": 2e-3, "torch": 1e-6}
SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
Runner = Callable[[Any], list[np.ndarray]]


@functools.cache
def reference(name: str) -> torch.nn.Module:
    return converted(CASES[name])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


def load_onnx(path: Path) -> Runner:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def run(inputs: Any) -> list[np.ndarray]:
        if not isinstance(inputs, Mapping):
            inputs = dict(zip(names, tensors_in(inputs), strict=True))
        return session.run(None, {name: inputs[name].numpy() for name in names})

    return run


def load_torch(path: Path) -> Runner:
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda inputs: [item.detach().numpy() for item in tensors_in(call_model(module, inputs))]


def load_openvino(path: Path) -> Runner:
    pytest.importorskip("openvino")
    from compression_manager.integrations.openvino_runtime import shared_core

    exact = {
        "INFERENCE_PRECISION_HINT": "f32",
        "LP_TRANSFORMS_MODE": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    model = shared_core().compile_model(path, "CPU", exact)
    names = [item.get_any_name() for item in model.inputs]

    def run(inputs: Any) -> list[np.ndarray]:
        if not isinstance(inputs, Mapping):
            inputs = dict(zip(names, tensors_in(inputs), strict=True))
        results = model({name: inputs[name].numpy() for name in names})
        return [results[index] for index in range(len(model.outputs))]

    return run


LOAD = {"onnx": load_onnx, "openvino": load_openvino, "torch": load_torch}


@functools.cache
def exported(name: str, format: str, folder: Path) -> Runner:
    """What runs the model's file; the batch size of the examples is none of those tested."""
    path = folder / f"{name}{SUFFIX[format]}"
    deploy.export(reference(name), path, format, CASES[name].inputs(5, seed=10))
    return LOAD[format](path)


def test_every_format_is_tested() -> None:
    assert LOAD.keys() | {"aot_inductor"} == FORMATS.keys()  # test_compilers.py has that one
    share = dict.fromkeys(LOAD, 10) | {"openvino": 4}
    assert all(share[name] * ALLOWED[name] <= FORMATS[name].tolerance for name in LOAD)


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("format", LOAD)
def test_a_file_returns_the_outputs_of_the_converted_model(
    format: str, name: str, batch: int, folder: Path
) -> None:
    inputs = CASES[name].inputs(batch, seed=batch)
    actual = exported(name, format, folder)(inputs)
    errors = []
    for arithmetic in (reference_arithmetic(), nullcontext()):
        with torch.no_grad(), arithmetic:
            expected = list(tensors_in(call_model(reference(name), inputs)))
        assert [tuple(item.shape) for item in expected] == [item.shape for item in actual]
        assert all(item.shape[0] == batch for item in actual)
        pairs = zip(expected, actual, strict=True)
        errors.append(max(_error(wanted.numpy(), got) for wanted, got in pairs))
    # Sums of integers are exact, those of float32 rounded, in an order that each runtime chooses: a
    # value between two integers may fall on either, in the model's two arithmetics as well.
    assert max(errors) <= MODEL_TOLERANCE
    assert min(errors) <= ALLOWED[format]


def _error(wanted: np.ndarray, got: np.ndarray) -> float:
    wanted, got = wanted.astype(np.float64), got.astype(np.float64)
    return float(np.sqrt(np.square(got - wanted).sum() / np.square(wanted).sum()))
