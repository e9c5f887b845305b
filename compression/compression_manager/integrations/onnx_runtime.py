"""Running ONNX files with onnxruntime; needs the extra `onnxruntime`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from compression_manager.tracing.graph_inputs import (
    ARGUMENTS,
    Arguments,
    called_as_model,
)
from compression_manager.tracing.graph_outputs import OUTPUTS


def load_onnx(model: Path | bytes, *, int8: bool) -> Callable[..., Any]:
    """Return what is called as the model is; the CPU computes, with as many threads as torch has.

    Args:
        model: the file, or its content.
        int8: whether quantized operators become 8-bit kernels, as is onnxruntime's default. These
            round biases and outputs once more, and on processors without VNNI let 8-bit products
            overflow. If not, the operators are computed in float32, as they are written.
    """
    options = onnxruntime.SessionOptions()
    if not int8:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    note = notes.get(ARGUMENTS)
    if note is None:
        arguments = Arguments.of_names([item.name for item in session.get_inputs()])
    else:
        arguments = Arguments.from_json(note)
    structure = json.loads(notes.get(OUTPUTS, "null"))
    return called_as_model(arguments, lambda feed: session.run(None, feed), structure)
