"""Running ONNX files with onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from compression_manager.model_call import tensors_in


def onnx_runner(path: Path) -> Callable[[Any], list[Tensor]]:
    """Return a function from a model's inputs to the tensors of its outputs, in order.

    Inputs that are a mapping are given by name, all others in order. The CPU computes what the
    file says, with as many threads as torch has: no optimization of the graph, of which some round
    otherwise, and those for processors without VNNI even let 8-bit products overflow.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        feed = {name: value.detach().cpu().numpy() for name, value in _named(inputs, names).items()}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return run


def _named(inputs: Any, names: list[str]) -> dict[str, Tensor]:
    if isinstance(inputs, Mapping) and set(names) <= inputs.keys():
        return {name: inputs[name] for name in names}
    return dict(zip(names, tensors_in(inputs), strict=True))
