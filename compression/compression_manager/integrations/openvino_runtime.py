"""Writing and running models with OpenVINO; needs the extra `openvino`."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import openvino
import torch
from openvino import opset13

from compression_manager.errors import ConfigError
from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.tracing.graph_inputs import (
    ARGUMENTS,
    Arguments,
    Feed,
    called_as_model,
)
from compression_manager.tracing.graph_outputs import OUTPUTS

_CONVOLUTIONS = ("Convolution", "GroupConvolution")


@functools.cache
def shared_core() -> openvino.Core:
    """Return the only Core of this process.

    A Core that computes on the CPU makes memory of its own the stack on which signals are handled,
    and with it that memory goes. Of two that do not go in the reverse order, the stack of the first
    remains set, and the next signal that Python handles (Ctrl-C, a worker of a DataLoader that
    ends) kills the process without a word.
    """
    return openvino.Core()


def write_openvino(content: bytes, path: Path) -> None:
    """Write the graph of an ONNX file to `path` and its weights beside it, as .bin.

    Args:
        content: of the ONNX file.
        path: ends in .xml.
    """
    model = _read_onnx(content)
    # Otherwise scales and biases would become float16.
    openvino.save_model(model, path, compress_to_fp16=False)


def load_openvino(model: Path | bytes, *, int8: bool, bfloat16: bool = False) -> Callable[..., Any]:
    """Return what is called as the model is; the CPU computes, with as many threads as torch has.

    Args:
        model: the .xml file, with its .bin beside it, or the content of an ONNX file.
        int8: whether quantized operators become 8-bit kernels, which overflow on processors without
            VNNI.
        bfloat16: whether all else is computed in bfloat16, where the processor multiplies that. In
            float32 otherwise, also where OpenVINO would choose bfloat16.
    """
    return called_as_network(*compile_openvino(model, int8=int8, bfloat16=bfloat16))


def compile_openvino(
    model: Path | bytes, *, int8: bool, bfloat16: bool = False, **more: Any
) -> tuple[openvino.Model, openvino.CompiledModel]:
    """Return the network of a file, and what computes it.

    Args:
        model: as for `load_openvino`.
        int8: as for `load_openvino`.
        bfloat16: as for `load_openvino`.
        more: settings of OpenVINO beside those that it needs to compute as the model does.
    """
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Or it quantizes inputs of linear layers with integer weights that are to stay as they are.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        **more,
    }
    if not int8:
        settings["LP_TRANSFORMS_MODE"] = False
    core = shared_core()
    network = core.read_model(model) if isinstance(model, Path) else _read_onnx(model)
    return network, core.compile_model(network, "CPU", settings)


def called_as_network(
    network: openvino.Model, compiled: openvino.CompiledModel
) -> Callable[..., Any]:
    """Return what is called as the model is of which `compile_openvino` made both."""
    dtypes = {item.get_any_name(): item.get_element_type().to_dtype() for item in compiled.inputs}
    own = threading.local()  # a request computes for one thread at a time, without a word

    def compute(feed: Feed) -> list[Any]:
        _check_dtypes(feed, dtypes)
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        results = own.request.infer(feed, share_inputs=True)
        return [results[index] for index in range(len(compiled.outputs))]

    arguments, structure = (_note(network, key) for key in (ARGUMENTS, OUTPUTS))
    return called_as_model(
        Arguments.of_names(list(dtypes)) if arguments is None else Arguments.from_json(arguments),
        compute,
        None if structure is None else json.loads(structure),
    )


def _note(network: openvino.Model, key: str) -> str | None:
    return str(network.get_rt_info(key).astype(str)) if network.has_rt_info(key) else None


def _read_onnx(content: bytes) -> openvino.Model:
    """Return the network of an ONNX file with all its inputs; OpenVINO drops the unused ones."""
    import onnx  # a machine that runs .xml files alone has no need of it

    network, proto = shared_core().read_model(content), onnx.load_model_from_string(content)
    used = {item.output(0).get_any_name(): item for item in network.get_parameters()}
    parameters = [used.get(item.name) or _unused(item) for item in proto.graph.input]
    network = openvino.Model(network.get_results(), parameters, network.get_friendly_name())
    for node in network.get_ops():
        if node.get_type_name() in _CONVOLUTIONS and not _is_computed(node):
            _keep_float(node)
    for note in proto.metadata_props:
        if note.key in (ARGUMENTS, OUTPUTS):
            network.set_rt_info(note.value, note.key)
    return network


def _is_computed(convolution: openvino.Node) -> bool:
    """Return whether OpenVINO's 8-bit kernel, which is oneDNN's, computes what it should."""
    attributes = convolution.get_attributes()
    shape, weight = convolution.input(0).get_partial_shape(), convolution.input(1).get_shape()
    spatial = [shape[axis] for axis in range(2, len(shape))]
    size = [axis.get_length() if axis.is_static else None for axis in spatial]
    depth, *kernel = weight[-len(size) - 1 :]
    begin, end = attributes["pads_begin"], attributes["pads_end"]
    geometries = [
        Geometry(tuple(attributes["strides"]), tuple(sides), tuple(attributes["dilations"]), 1)
        for sides in (begin, end)
    ]
    return all(item.is_computed_by_onednn(size, kernel, depth) for item in geometries)


def _keep_float(convolution: openvino.Node) -> None:
    """Put what changes no number between a convolution and its quantizer, so that both stay."""
    source, lowest = convolution.input_value(0), float(torch.finfo(torch.float32).min)
    unchanged = opset13.maximum(source, opset13.constant(lowest, dtype="float32"))
    convolution.input(0).replace_source_output(unchanged.output(0))


def _unused(input: Any) -> Any:
    """Return the input that an `onnx.ValueInfoProto` describes."""
    from onnx.helper import tensor_dtype_to_np_dtype

    kind = input.type.tensor_type
    shape = [item.dim_value if item.HasField("dim_value") else -1 for item in kind.shape.dim]
    parameter = opset13.parameter(shape, tensor_dtype_to_np_dtype(kind.elem_type), name=input.name)
    parameter.output(0).get_tensor().set_names({input.name})
    return parameter


def _check_dtypes(feed: Feed, dtypes: Mapping[str, Any]) -> None:
    """Raise ConfigError for an input of another dtype, which OpenVINO would convert."""
    for name, array in feed.items():
        if array.dtype != dtypes[name]:
            raise ConfigError(
                f"the exported model takes {name} as {dtypes[name]}, got {array.dtype}."
            )
