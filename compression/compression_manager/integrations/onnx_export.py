"""A traced model as an ONNX file; needs the extra `onnx`."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram

from compression_manager.errors import NotExportableError
from compression_manager.integrations.onnx_graph import write_attention
from compression_manager.integrations.onnx_names import name_inputs_and_outputs
from compression_manager.integrations.onnx_translation import OPSET, onnx_translation_table
from compression_manager.tracing.graph_inputs import ARGUMENTS
from compression_manager.tracing.graph_outputs import (
    OUTPUTS,
    named_outputs,
    without_constants_returned,
)
from compression_manager.tracing.input_sizes import BATCH, names_of_inputs, sizes_of_inputs
from compression_manager.tracing.program import arguments_of_program


def to_onnx(program: ExportedProgram) -> bytes:
    """Return the ModelProto of a program whose first dimensions may be symbolic; changes its graph.

    Args:
        program: what `trace` returned.

    Raises:
        NotExportableError: the model writes to its buffers, which a file cannot keep, or returns
            what it cannot hold.
        Exception: whatever the exporter raises, for example for more than 2 GiB, which a
            ModelProto cannot hold.
    """
    write_attention(program)
    inputs = names_of_inputs(program)
    outputs, structure = named_outputs(program, inputs)
    without_constants_returned(program)
    with warnings.catch_warnings(), _without_notes_of_exporter():
        # The exporter calls what torch itself has deprecated.
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes=_named_batch(program),
            custom_translation_table=onnx_translation_table(),
        )
    assert converted is not None  # with dynamo it never is
    _require_no_memory(converted.exported_program)
    name_inputs_and_outputs(converted.model.graph, inputs, outputs)
    proto = converted.model_proto
    _drop_notes(proto.graph)
    arguments = arguments_of_program(program, inputs).to_json()
    for key, value in {ARGUMENTS: arguments, OUTPUTS: json.dumps(structure)}.items():
        note = proto.metadata_props.add()
        note.key, note.value = key, value
    content: bytes = proto.SerializeToString()
    return content


def _drop_notes(graph: Any) -> None:
    """Delete what the exporter notes on a `GraphProto` for its own developers, in place.

    Stack traces and names of classes take several times the bytes of small weights. Shapes of
    computed values stay: onnxruntime fuses layers by them. Those of initializers stand in these.
    """
    named = (*graph.input, *graph.output, *graph.initializer, *graph.value_info)
    for item in (graph, *graph.node, *named):
        item.ClearField("metadata_props")
    initializers = {item.name for item in graph.initializer}
    computed = [item for item in graph.value_info if item.name not in initializers]
    del graph.value_info[:]
    graph.value_info.extend(computed)
    for attribute in (item for node in graph.node for item in node.attribute):
        if attribute.HasField("g"):  # of a branch or a loop
            _drop_notes(attribute.g)


def _require_no_memory(program: ExportedProgram | None) -> None:
    """Raise NotExportableError if a decomposed program changes buffers."""
    assert program is not None  # it was made of one
    written = sorted(program.graph_signature.buffers_to_mutate.values())
    if written:
        raise NotExportableError(
            f"the model changes {', '.join(written)} in its forward pass; files of ONNX and "
            "OpenVINO have no memory from one call to the next. Return it as an output, or use the "
            "format 'torch'."
        )


@contextmanager
def _without_notes_of_exporter() -> Iterator[None]:
    """Keep the exporter from listing constants that a model returns, which are kept elsewhere.

    And operators that it skips where torchvision is missing, and weights that the model returns.
    """
    package = "torch.onnx._internal.exporter"
    names = (
        f"{package}._core",
        f"{package}._registration",
        "onnx_ir.passes.common.initializer_deduplication",
    )
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _named_batch(program: ExportedProgram) -> list[Any]:
    """Return the name "batch" for the first symbolic dimension; all others share the symbol."""
    sizes = sizes_of_inputs(program)
    first = next((index for index, item in enumerate(sizes) if BATCH in item), None)
    return [{0: BATCH} if index == first else None for index in range(len(sizes))]
