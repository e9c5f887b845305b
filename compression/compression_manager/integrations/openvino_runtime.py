"""Writing and running models with OpenVINO; needs the extra `openvino`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import torch

from compression_manager.integrations.graph_inputs import Feed, called_as_model


def write_openvino(content: bytes, path: Path) -> None:
    """Write the graph of an ONNX file to `path` and its weights beside it, as .bin.

    Args:
        content: of the ONNX file.
        path: ends in .xml.
    """
    model = openvino.Core().read_model(content)
    # Otherwise scales and biases would become float16.
    openvino.save_model(model, path, compress_to_fp16=False)


def load_openvino(model: Path | bytes, *, int8: bool) -> Callable[..., Any]:
    """Return what is called as the model is; the CPU computes, with as many threads as torch has.

    Args:
        model: the .xml file, with its .bin beside it, or the content of an ONNX file.
        int8: whether quantized operators become 8-bit kernels, which overflow on processors without
            VNNI. All else is computed in float32, also where OpenVINO would choose bfloat16.
    """
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Or it quantizes inputs of linear layers with integer weights that are to stay as they are.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    if not int8:
        settings["LP_TRANSFORMS_MODE"] = False
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    names = [item.get_any_name() for item in compiled.inputs]
    request = compiled.create_infer_request()

    def compute(feed: Feed) -> list[Any]:
        results = request.infer(feed, share_inputs=True)
        return [results[index] for index in range(len(compiled.outputs))]

    return called_as_model(names, compute)
